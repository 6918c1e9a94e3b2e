"""The same few images in every form that an extraction takes."""

import csv
import io
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat
from support.configs import call, compose_config

WORDNET = ("n00000003", "n00000010", "n00000020")
"""The classes, in the order of their names."""

ILSVRC = {1: "n00000020", 2: "n00000003", 3: "n00000010"}
"""The development kit's numbers of the classes, in another order."""

SMALL = ("autoencoder=identity", "image_size=8", "samples_per_shard=4", "batch_size=3", "num_workers=0", "threads=1")


def pictures(count: int = 22) -> list[tuple[str, str, bytes]]:
    """Name, class and PNG of each image; the names of ImageNet's validation images, whatever they hold."""
    rng = np.random.default_rng(1)  # of which the last class comes first
    found = []
    for number in range(1, count + 1):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
        name = f"ILSVRC2012_val_{number:08d}.JPEG"
        found.append((name, WORDNET[int(rng.integers(3))], buffer.getvalue()))
    return found


def flat(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, _, content in pictures():
        (folder / name).write_bytes(content)
    return folder


def as_folders(folder: Path) -> list[str]:
    for name, label, content in pictures():
        (folder / "images" / label).mkdir(parents=True, exist_ok=True)
        (folder / "images" / label / name).write_bytes(content)
    return [f"source={folder}/images"]


def as_csv(folder: Path) -> list[str]:
    flat(folder / "images")
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "comment", "label"])
        writer.writerows([name.removesuffix(".JPEG"), 'a "fine", one', label] for name, label, _ in pictures())
    columns = ["reader.image_column=id", "reader.label_column=label", "reader.ending=.JPEG"]
    return [f"source={folder}/images", "reader=labels", f"reader.labels={folder}/labels.csv", *columns]


def as_text(folder: Path) -> list[str]:
    """Numbers for classes, and a file of their names."""
    flat(folder / "images")
    lines = [f"{name} {WORDNET.index(label)}\n" for name, label, _ in pictures()]
    (folder / "val.txt").write_text("".join(lines))
    (folder / "names.txt").write_text("\n".join(WORDNET))
    words = [f"source={folder}/images", "reader=labels", f"reader.labels={folder}/val.txt"]
    return [*words, f"classes={folder}/names.txt"]


def devkit(folder: Path) -> Path:
    numbers = {name: number for number, name in ILSVRC.items()}
    (folder / "data").mkdir(parents=True)
    truth = "".join(f"{numbers[label]}\n" for _, label, _ in pictures())
    (folder / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)
    kind = [("ILSVRC2012_ID", float), ("WNID", object), ("num_children", float)]
    rows = [*((number, name, 0) for number, name in ILSVRC.items()), (4, "n00000099", 3)]  # a group of classes
    savemat(folder / "data" / "meta.mat", {"synsets": np.array(rows, dtype=kind)[:, None]})
    return folder


def as_imagenet_val(folder: Path) -> list[str]:
    flat(folder / "images")
    return [f"source={folder}/images", "reader=imagenet_val", f"reader.devkit={devkit(folder / 'kit')}"]


def as_imagenet_val_by_text(folder: Path) -> list[str]:
    words = as_imagenet_val(folder)
    (folder / "kit" / "data" / "meta.mat").unlink()
    (folder / "synsets.txt").write_text("".join(f"{number}, {name}\n" for number, name in ILSVRC.items()))
    return [*words, f"reader.synsets={folder}/synsets.txt"]


def write_parquet(path: Path, rows: list[tuple[str, object, bytes]], names=None, group: int = 3) -> None:
    """Rows as the Hugging Face hub has them; with ``names``, their classes are numbers and the schema names them."""
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    label = pyarrow.int64() if names else pyarrow.string()
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema([("note", pyarrow.string()), ("img", image), ("fine_label", label)])
    if names:
        features = {"img": {"_type": "Image"}, "fine_label": {"names": list(names), "_type": "ClassLabel"}}
        schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    values = [
        {"note": "x", "img": {"bytes": content, "path": name}, "fine_label": names.index(label) if names else label}
        for name, label, content in rows
    ]
    parquet.write_table(pyarrow.Table.from_pylist(values, schema), path, row_group_size=group)


COLUMNS = ["reader=parquet", "reader.image_column=img", "reader.label_column=fine_label"]


def as_parquet(folder: Path) -> list[str]:
    """Two files of several row groups; another order of the classes in the data set, which a file puts right."""
    for number, rows in enumerate((pictures()[:13], pictures()[13:])):
        write_parquet(folder / "data" / f"train-0000{number}-of-00002.parquet", rows, WORDNET[::-1])
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", pictures()[:2], WORDNET[::-1])
    (folder / "names.txt").write_text("\n".join(WORDNET))
    return [f"source={folder}", *COLUMNS, "reader.files='data/train-*'", f"classes={folder}/names.txt"]


def as_parquet_of_names(folder: Path) -> list[str]:
    write_parquet(folder / "one.parquet", pictures(), group=100)
    return [f"source={folder}/one.parquet", *COLUMNS]


def as_repository(folder: Path) -> list[str]:
    """For :func:`support.hub.hub_of` to serve as ``a/b``."""
    words = as_parquet(folder)
    return ["source=hf://datasets/a/b", *words[1:]]


def as_stream(folder: Path) -> list[str]:
    return [*as_repository(folder), "reader.stream=true"]


def as_food101(folder: Path) -> list[str]:
    """In the files of Food-101, which torchvision reads: any number of classes."""
    by_class: dict[str, list[str]] = {label: [] for label in WORDNET}
    for name, label, content in pictures():
        path = folder / "food-101" / "images" / label / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        by_class[label].append(f"{label}/{name}")
    (folder / "food-101" / "meta").mkdir()
    (folder / "food-101" / "meta" / "train.json").write_text(json.dumps(by_class))
    return [f"source={folder}", "reader=torchvision", "reader.dataset=Food101", "reader.part=train"]


FORMS: dict[str, Callable[[Path], list[str]]] = {
    "folders": as_folders,
    "csv": as_csv,
    "text": as_text,
    "imagenet_val": as_imagenet_val,
    "imagenet_val_by_text": as_imagenet_val_by_text,
    "parquet": as_parquet,
    "parquet_of_names": as_parquet_of_names,
    "repository": as_repository,
    "stream": as_stream,
    "torchvision": as_food101,
}
"""From a folder to the words of the command that takes the images from there."""


def killed(image: int, words: list[str]) -> int:
    """The exit status of an extraction that the system kills when it decodes the image of that number."""
    process = multiprocessing.get_context("fork").Process(target=_extract_until, args=(image, words))
    process.start()
    process.join(240)
    return process.exitcode


def _extract_until(image: int, words: list[str]) -> None:
    from dcdit import extract
    from dcdit.extraction import decode

    decoded, count = decode.decode_image, iter(range(image))

    def decode_or_die(*arguments):
        if next(count, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return decoded(*arguments)

    decode.decode_image = decode_or_die
    call(extract, compose_config(*words, name="extract"))
