"""Many images in one ``.npz``, by a resumable job."""

import time
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dcdit.checks import Count
from dcdit.errors import UserError
from dcdit.runtime.display import Display
from dcdit.runtime.files import make_writable_folder, read_json, replacing, write_json
from dcdit.runtime.jobs import ImageJob
from dcdit.sampling.cost import SamplingCost
from dcdit.sampling.generate import labels_of
from dcdit.sampling.settings import Labels
from dcdit.sampling.setup import Sampling
from dcdit.settings.plugins import plugins_of

_EPOCH = (1980, 1, 1, 0, 0, 0)  # of the files within the archive: equal images give equal bytes


@dataclass(frozen=True)
class ArchivedChunk:
    """What is recorded of a chunk of images.

    Attributes:
        cost: FLOPs and kept tokens.
        seconds: that sampling and decoding took.
        shape: (n, height, width, 3).
    """

    cost: SamplingCost
    seconds: float
    shape: tuple[Count, Count, Count, Count]


class _ArchiveJob(ImageJob[ArchivedChunk]):
    def part_path(self, task: int) -> Path:
        """Return the file of a task's images."""
        return self.work / f"chunk-{task:06d}.npy"


class ImageArchive:
    """One process of a generation; the arguments are the keys of ``configs/generate.yaml``."""

    def __init__(self, sampling: Sampling, out: Path, count: int, chunk_size: int, png: bool, labels: Labels) -> None:
        self.sampling, self.out, self.count, self.png = sampling, out, count, png
        self.npz, self.summary = out / "samples.npz", out / "samples.json"
        self.labels = labels_of(labels, count, sampling.model.network.num_classes, sampling.config.seed)
        self.fingerprint = {
            **sampling.described(),
            "count": count,
            "labels": labels,
            "chunk_size": chunk_size,
            "batch_size": sampling.config.batch_size,
            "checkpoint": sampling.model.digest,
        }
        self.dropped = ""
        """What to tell the user of tokens that had no room; empty before this process has joined the chunks."""
        self.job = _ArchiveJob(ArchivedChunk, self.npz, "generation", self.fingerprint, count, chunk_size)

    def run(self, rank: int, world_size: int, display: Display) -> bool:
        """Sample this process's share of the chunks; return whether the file is complete.

        Raises:
            UserError: if the folder holds other images.
        """
        make_writable_folder(self.out, f"out={self.out}")
        with self.job.lock():
            if self.npz.is_file():
                self._check_finished()
                return True
            self.job.check_fingerprint()
        self.job.do(rank, world_size, lambda task: self._sample(task, display), display)
        self.job.finalize(self.npz, self._join)
        return self.npz.is_file()

    def _check_finished(self) -> None:
        """Raise :class:`UserError` unless the file that is there is whole, and is what would be made."""
        remedy = "choose another place, or delete both"
        try:
            before = read_json(self.summary, dict[str, Any], remedy).get("plan")
        except FileNotFoundError:
            before = None
        if not isinstance(before, dict):
            raise UserError(f"out: {self.npz} is there, but {self.summary.name} does not say what it holds: {remedy}")
        self.job.compare(before)
        try:
            with zipfile.ZipFile(self.npz) as archive:
                damaged = archive.testzip()
        except (OSError, zipfile.BadZipFile) as error:
            damaged = str(error)
        if damaged:
            raise UserError(f"{self.npz} is damaged ({damaged}): delete it, and the same command makes it again")

    def _sample(self, task: int, display: Display) -> None:
        begin = time.perf_counter()
        images, cost = [], SamplingCost()
        for batch in self.sampling.generate(self.labels, self.job.numbers(task)):
            images.append(pixels(self.sampling.images(batch)))
            cost += SamplingCost.of(batch)
            display.advance(len(batch.indices))
        chunk = np.concatenate(images)
        if self.png:
            self._save_png(task, chunk)
        record = ArchivedChunk(cost, time.perf_counter() - begin, chunk.shape)
        self.job.finish(task, record, lambda file: np.save(file, chunk, allow_pickle=False))

    def _save_png(self, task: int, images: NDArray[np.uint8]) -> None:
        (self.out / "png").mkdir(exist_ok=True)
        for number, image in zip(self.job.numbers(task), images, strict=True):
            with replacing(self.out / "png" / f"{number:06d}.png") as file:
                Image.fromarray(image).save(file, "png")

    def _join(self, records: list[ArchivedChunk]) -> None:
        """Put the chunks into one file, one after the other, and say what they are."""
        shape = (self.count, *records[0].shape[1:])
        chunks = (np.load(self.job.part_path(task), allow_pickle=False) for task in range(self.job.tasks))
        model, calibration = self.sampling.model, self.sampling.calibration
        cost = SamplingCost.total(record.cost for record in records)
        figures = {
            "plan": self.fingerprint,
            "shape": list(shape),
            "tflops_per_image": cost.tflops_per_image,
            "keep_ratio": cost.mean_keep_ratio(model.latents.positions) if model.network.routes else None,
            "seconds_per_image": sum(record.seconds for record in records) / self.count,
            "calibration": asdict(calibration) if calibration else None,
            "training": dict(model.training),
        }
        if plugins := plugins_of(self.fingerprint):
            figures["plugins"] = plugins
        lost = cost.dropped(model.latents.positions)
        if lost:
            figures["dropped_by_capacity"] = asdict(lost)
            self.dropped = lost.described(self.sampling.config.capacity)
        with replacing(self.npz) as target:
            with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
                for name, dtype, arrays, size in (
                    ("arr_0", np.dtype(np.uint8), chunks, shape),
                    ("arr_1", np.dtype(np.int64), [self.labels.numpy()], (self.count,)),
                ):
                    with archive.open(zipfile.ZipInfo(f"{name}.npy", _EPOCH), "w", force_zip64=True) as file:
                        append_npy(file, dtype, size, arrays)  # type: ignore[arg-type]
                figures["content"] = f"{archive.getinfo('arr_0.npy').CRC:08x}"  # by which the file knows its images
            write_json(self.summary, figures)  # before the images are there: nobody could say what they are


def pixels(images: Tensor) -> NDArray[np.uint8]:
    """Return images (n, 1 or 3, height, width) uint8 as (n, height, width, 3); grey becomes three equal channels."""
    return images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()


def append_npy(file: BinaryIO, dtype: np.dtype[Any], shape: tuple[int, ...], arrays: Iterable[NDArray[Any]]) -> None:
    """Write one .npy of ``shape`` from ``arrays`` that follow each other along the first axis."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for array in arrays:
        file.write(np.ascontiguousarray(array, dtype).data)
