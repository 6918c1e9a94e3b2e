"""Every form of a source gives the same classes, labels and bytes; mistakes in it are told before work begins."""

import io
import json
import os
import signal
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.configs import call, compose_config
from support.hub import hub_of
from support.sources import FORMS, SMALL, WORDNET, as_csv, as_imagenet_val, as_text, devkit, flat, killed, pictures

from dcdit import extract
from dcdit.data.manifest import Manifest
from dcdit.errors import UserError


def run(*words: str) -> None:
    call(extract, compose_config(*SMALL, *words, name="extract"))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[!.]*"))}


def samples(folder: Path) -> Counter[tuple[str, bytes]]:
    """Class and pixels of every image, which the latents of ``identity`` are but for their rounding."""
    manifest, found = Manifest.read(folder / "manifest.json"), Counter()
    for shard in manifest.shards:
        with tarfile.open(folder / shard.name) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name, note in members.items():
            if name.endswith(".json"):
                label = manifest.classes[json.loads(note)["label"]]
                latent = np.load(io.BytesIO(members[name.replace(".json", ".latent.npy")]))
                found[label, np.rint(latent * 127.5 + 127.5).astype(np.uint8).tobytes()] += 1
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What class folders give."""
    folder = tmp_path_factory.mktemp("expected")
    run(*FORMS["folders"](folder), f"out={folder}/out")
    found = samples(folder / "out" / "train")
    by_class = Counter(label for _, label, _ in pictures())
    assert sum(found.values()) == 22
    assert {name: sum(n for (label, _), n in found.items() if label == name) for name in WORDNET} == by_class
    return found


@pytest.fixture
def served(tmp_path):
    """A hub of the repository ``a/b``."""
    with hub_of({"a/b": tmp_path / "source"}, tmp_path / "cache") as hub:
        yield hub


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("form", FORMS)
def test_same_classes_labels_and_bytes_after_a_kill_and_on_two_processes(form, expected, tmp_path, monkeypatch):
    words = FORMS[form](tmp_path / "source")
    run(*words, f"out={tmp_path}/whole")
    whole = content(tmp_path / "whole" / "train")
    assert Manifest.read(tmp_path / "whole" / "train" / "manifest.json").classes == WORDNET
    assert samples(tmp_path / "whole" / "train") == expected
    broken = [*SMALL, *words, f"out={tmp_path}/broken"]
    assert killed(11, broken) == -signal.SIGKILL
    assert 1 <= len(list((tmp_path / "broken" / "train").glob("*.tar"))) < len(whole) - 1
    for rank in (1, 0):
        monkeypatch.setattr(extract, "processes", lambda rank=rank: (rank, 2))
        run(*words, f"out={tmp_path}/broken", *["num_workers=2"][:rank])
    assert content(tmp_path / "broken" / "train") == whole


def test_validation_images_of_imagenet_have_the_labels_of_class_folders(expected, tmp_path, capsys):
    """With the classes of a train split of class folders, and where classes have no images."""
    for name in (*WORDNET, "n00000001", "n00000015"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / name / "a.png")
    run(f"source={tmp_path}/train", f"out={tmp_path}/out")
    assert (
        "5 classes in the order of their names: 'n00000001', 'n00000003', ..., 'n00000020'" in capsys.readouterr().err
    )
    run(*as_imagenet_val(tmp_path / "val"), f"out={tmp_path}/out", "split=val")
    assert samples(tmp_path / "out" / "val") == expected
    assert Manifest.read(tmp_path / "out" / "val" / "manifest.json").classes == tuple(
        sorted((*WORDNET, "n00000001", "n00000015"))
    )
    (tmp_path / "other" / "n00000003").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "other" / "n00000003" / "a.png")
    run(f"source={tmp_path}/other", f"out={tmp_path}/fewer")
    with pytest.raises(UserError, match="the train split has no class 'n00000010', nor 1 others"):
        run(*as_imagenet_val(tmp_path / "val2"), f"out={tmp_path}/fewer", "split=val")


def test_a_file_decides_the_order_of_the_classes_and_is_recorded(tmp_path, capsys):
    names = tmp_path / "order.txt"
    names.write_text("\n".join(reversed(WORDNET)))
    words = [*FORMS["folders"](tmp_path), f"out={tmp_path}/out", f"classes={names}"]
    run(*words)
    manifest = Manifest.read(tmp_path / "out" / "train" / "manifest.json")
    assert manifest.classes == WORDNET[::-1]
    assert manifest.extraction["source"]["order of the classes"].startswith("3 names of a file, ")
    assert f"3 classes in the order of classes={names}: 'n00000020'" in capsys.readouterr().err
    names.write_text("\n".join(WORDNET))
    with pytest.raises(UserError, match="source: 'order of the classes' has changed since this extraction began"):
        run(*words)
    names.write_text("\n".join(WORDNET[:2]))
    with pytest.raises(UserError, match=r"classes=.*order.txt has no class 'n00000020': add it there, or leave it out"):
        run(*words[:-2], f"out={tmp_path}/new", words[-1])


def refused(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        run(*words, f"out={tmp_path}/refused")
    assert not (tmp_path / "refused").exists()  # nothing was encoded, nothing begun


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("_00000003", "_00000077"), r"names 1 images that are not in .*'ILSVRC.*77.JPEG'"),
        (lambda text: text.replace("_00000003", "_00000002"), r"line 4: 'ILSVRC.*02.JPEG' has two classes"),
        (
            lambda text: text.replace("ILSVRC2012_val_00000003", "./x/../ILSVRC2012_val_00000002"),
            r"02.JPEG' has two cl",
        ),
        (lambda text: text.replace("ILSVRC2012_val_00000003", "../images/a"), r"line 4: '../images/a.JPEG' is no path"),
        (lambda text: text.replace("ILSVRC2012_val_00000003", "/etc/passwd"), r"line 4: .* is no path of an image"),
        (lambda text: text.replace("ILSVRC2012_val_00000003", ""), r"line 4: '.JPEG' is no path|such as"),
        (lambda text: text[: text.index("ILSVRC2012_val_00000022")], r"says no class of 1 images .*22.JPEG"),
        (lambda text: text.replace("n00000003", "", 1), r"line \d+: .* has no class"),
        (lambda text: text.replace("n00000003", "a\x1bb"), r"the class 'a\\x1bb' holds control characters"),
        (lambda text: text.replace("id,", "name,"), r"reader.image_column=id is not among its headings: name, comment"),
        (lambda text: text.replace(",label", ""), r"reader.label_column=label is not among its headings"),
        (lambda text: text + "one\n", r"line 24 has 1 of 3 columns"),
        (lambda text: text.replace('""fine""', '"fine'), r"line \d+ is none of a table"),
        (lambda text: "", r"reader.image_column=id is not among its headings"),
    ],
)
def test_mistakes_in_a_table_of_labels_are_told_before_work(tmp_path, change, message):
    words = as_csv(tmp_path)
    text = (tmp_path / "labels.csv").read_text()
    assert change(text) != text
    (tmp_path / "labels.csv").write_text(change(text))
    refused(words, message, tmp_path)


def test_other_mistakes_in_labels_are_told_before_work(tmp_path):
    words, table = as_text(tmp_path / "text"), as_csv(tmp_path / "table")
    names = tmp_path / "text" / "names.txt"
    for asked, message in (
        (words[:-1], r"its classes are numbers, such as \d: say how many there are with classes=..., or give a text"),
        ([*words[:-1], "classes=2"], r"label 2 is none of the 2 classes of classes=2, which have the labels 0 to 1"),
        ([*words, "reader.label_column=a"], r"only a .csv or .tsv file has columns"),
        ([*table[:-1], "reader.ending=''"], r"names 22 images that are not in .*: set reader.ending=.JPEG"),
        ([*words[:2], f"reader.labels={tmp_path}/nowhere.txt"], r"reader.labels=.*nowhere.txt: there is no such file"),
        ([*words[:2]], r"reader.labels is not set"),
        ([f"source={tmp_path}/text/images"], r"has no subfolders: .* or take reader=labels"),
    ):
        refused(asked, message, tmp_path)
    names.write_text("\n".join(WORDNET[:2]))
    refused([*table, f"classes={names}"], r"classes=.*names.txt has no class 'n00000020': add it there", tmp_path)


def test_captions_and_images_of_another_split_are_no_broken_images(tmp_path, capsys):
    words = as_text(tmp_path)
    for name, _, _ in pictures():
        (tmp_path / "images" / name).with_suffix(".txt").write_text("a caption")
    (tmp_path / "images" / "other.png").write_bytes(b"x")
    (tmp_path / "images" / "other.heic").write_bytes(b"x")
    run(*words, "reader.partial=true", f"out={tmp_path}/out")
    assert Manifest.read(tmp_path / "out" / "train" / "manifest.json").skipped == ()
    said = capsys.readouterr().err
    assert "22 files without an image's name are left out: .txt (22)" in said
    assert "1 images without a class in reader.labels=" in said


def test_mistakes_in_a_development_kit_are_told_before_work(tmp_path):
    images, kit = flat(tmp_path / "images"), devkit(tmp_path / "kit")
    truth, meta = (kit / "data" / name for name in ("ILSVRC2012_validation_ground_truth.txt", "meta.mat"))
    words = [f"source={images}", "reader=imagenet_val", f"reader.devkit={kit}"]
    right = truth.read_text()
    for text, message in (
        (right + "1\n", r"names 1 images that are not in .*'ILSVRC2012_val_00000023.JPEG'"),
        (right[2:], r"says no class of 1 images in .*, such as 'ILSVRC2012_val_00000022.JPEG'"),
        (right.replace("3", "4"), r"has class 4, of which no WordNet id is known"),
        (right.replace("3", "x"), r"'x' in ILSVRC2012_validation_ground_truth.txt is no number of a class"),
    ):
        truth.write_text(text)
        refused(words, message, tmp_path)
    truth.write_text(right)
    refused([*words, "classes=3"], r"classes=3: reader=imagenet_val names its classes", tmp_path)
    for content, message in (
        ("1 n00000020\n2 n00000003\n3 n00000003\n", r"WordNet id 'n00000003' is there twice, or is none"),
        ("1 n00000020\n2\n", r"'2' is no line such as `1, n02119789`"),
        ("1 cat\n", r"'1 cat' is no line such as"),
    ):
        (tmp_path / "synsets.txt").write_text(content)
        refused([*words, f"reader.synsets={tmp_path}/synsets.txt"], message, tmp_path)
    os.truncate(meta, 300)
    refused(words, r"meta.mat cannot be read .* or give a text file of `ILSVRC id, WordNet id`", tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "scipy.io", None)
        refused(words, r"scipy reads its meta.mat: pip install scipy, or give a text file", tmp_path)
    meta.unlink()
    refused(words, r"there is no .*meta.mat: unpack ILSVRC2012_devkit_t12", tmp_path)
