"""Many images in one file: ``python -m dcdit.generate checkpoint=runs/b_n4/checkpoints/last.ckpt out=samples/b_n4``.

Writes what the ADM evaluation suite reads: ``samples.npz`` with ``arr_0``, (N, height, width, 3) uint8, and the labels
as ``arr_1``. Images are drawn in parts that are kept as files: a killed run goes on where it was, any number of
processes shares the work, and the result is the same file.
"""

import json
import sys
import time
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import hydra
import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor

from dcdit.compute.flops import Cost
from dcdit.errors import UserError
from dcdit.network import DCDiT
from dcdit.runtime.devices import fingerprint
from dcdit.runtime.jobs import ImageJob, write_json
from dcdit.runtime.processes import processes
from dcdit.runtime.progress import Display
from dcdit.sampling.setup import Drawing, own_values, prepare
from dcdit.settings.entry import CONFIG_DIR, entry_point
from dcdit.settings.schema import call_checked

NPZ, SUMMARY = "samples.npz", "samples.json"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # of the files within the archive: equal images give equal bytes


@dataclass(frozen=True)
class Request:
    """What to generate.

    Attributes:
        out: folder for the results.
        count: number of images.
        part: images of a part.
        png: write each image as a PNG too.
    """

    out: str
    count: int = 50_000
    part: int = 500
    png: bool = False

    def __post_init__(self) -> None:
        for name in ("count", "part"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} is not a positive number")


class Generation:
    """One process of a generation.

    Args:
        drawing: what draws.
        request: how much, and where to.
    """

    def __init__(self, drawing: Drawing, request: Request) -> None:
        self.drawing, self.request = drawing, request
        self.out = Path(request.out)
        self.labels = torch.arange(request.count) % len(drawing.model.classes)
        self.plan = {
            **drawing.described(),
            "count": request.count,
            "part": request.part,
            "batch_size": drawing.common.batch_size,
            "checkpoint": fingerprint(drawing.model.network),
        }
        self.ledger = ImageJob(self.out, "generation", self.plan, request.count, request.part)

    def run(self, rank: int, world_size: int, display: Display) -> bool:
        """Draw this process's share of the parts; returns whether the file is complete.

        Raises:
            UserError: if the folder holds other images.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        with self.ledger.lock():
            if (self.out / NPZ).is_file():
                self._check_finished()
                return True
            self.ledger.begin()
        self.ledger.do(rank, world_size, lambda unit: self._draw(unit, display), display)
        self.ledger.conclude(self.out / NPZ, self._conclude)
        return (self.out / NPZ).is_file()

    def _check_finished(self) -> None:
        try:
            before = json.loads((self.out / SUMMARY).read_text())["plan"]
        except (OSError, ValueError, KeyError):
            raise UserError(f"out: {self.out / NPZ} is there, but not what it holds: choose another place") from None
        self.ledger.compare(before)

    def _part(self, unit: int) -> Path:
        return self.ledger.work / f"part-{unit:06d}.npy"

    def _draw(self, unit: int, display: Display) -> None:
        cost = Cost.of_network(self.drawing.model.network)
        begin = time.perf_counter()
        images, flops, kept = [], 0.0, 0.0
        for drawn in self.drawing.generate(self.labels, self.ledger.numbers(unit)):
            images.append(pixels(self.drawing.decode(drawn.latents)))
            flops += drawn.flops(cost).sum().item()
            kept += torch.cat(drawn.lengths).double().mean().item() * len(drawn.indices)
            display.advance(len(drawn.indices))
        part = np.concatenate(images)
        if self.request.png:
            self._save_png(unit, part)
        draft = self._part(unit).with_suffix(".part")
        with draft.open("wb") as file:
            np.save(file, part, allow_pickle=False)
        draft.replace(self._part(unit))
        seconds = time.perf_counter() - begin
        self.ledger.enter(unit, {"flops": flops, "kept": kept, "seconds": seconds, "shape": list(part.shape)})

    def _save_png(self, unit: int, images: NDArray[np.uint8]) -> None:
        (self.out / "png").mkdir(exist_ok=True)
        for number, image in zip(self.ledger.numbers(unit), images, strict=True):
            Image.fromarray(image).save(self.out / "png" / f"{number:06d}.png")

    def _conclude(self, records: list[dict[str, Any]]) -> None:
        """Join the parts, one after the other, and say what they are."""
        count = self.request.count
        shape = (count, *records[0]["shape"][1:])
        parts = (np.load(self._part(unit), allow_pickle=False) for unit in range(self.ledger.units))
        draft = self.out / f"{NPZ}.part"
        with zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as archive:
            for name, dtype, arrays, size in (
                ("arr_0", np.dtype(np.uint8), parts, shape),
                ("arr_1", np.dtype(np.int64), [self.labels.numpy()], (count,)),
            ):
                with archive.open(zipfile.ZipInfo(f"{name}.npy", _EPOCH), "w", force_zip64=True) as file:
                    append_npy(file, dtype, size, arrays)  # type: ignore[arg-type]
        positions = np.prod(self.drawing.model.latents["shape"][1:])
        routed = isinstance(self.drawing.model.network, DCDiT)
        calibration = self.drawing.calibration
        figures = {
            "plan": self.plan,
            "shape": list(shape),
            "tflops_per_image": sum(record["flops"] for record in records) / count / 1e12,
            "kept_share": sum(record["kept"] for record in records) / count / positions if routed else None,
            "seconds_per_image": sum(record["seconds"] for record in records) / count,
            "calibration": asdict(calibration) if calibration else None,
        }
        write_json(self.out / SUMMARY, figures)
        draft.replace(self.out / NPZ)


def pixels(images: Tensor) -> NDArray[np.uint8]:
    """(n, 1 or 3, height, width) uint8 to (n, height, width, 3); grey becomes three equal channels."""
    return images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()


def append_npy(file: BinaryIO, dtype: np.dtype[Any], shape: tuple[int, ...], arrays: Iterable[NDArray[Any]]) -> None:
    """Write one .npy of ``shape`` from ``arrays`` that follow each other along the first axis."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for array in arrays:
        file.write(np.ascontiguousarray(array, dtype).data)


def run(config: DictConfig) -> Path:
    """Generate what ``config`` asks for; returns the folder."""
    values: Any = OmegaConf.to_container(config, resolve=True)
    request = call_checked(Request, own_values(values), "")
    generation = Generation(prepare(values), request)
    rank, world_size = processes()
    with Display(rank, "drawing", "part") as display:
        try:
            complete = generation.run(rank, world_size, display)
        except OSError as error:
            raise UserError(
                f"{error.filename or request.out}: {error.strerror or error}. Finished parts are kept; the same command"
                " goes on from there"
            ) from error
        except KeyboardInterrupt:
            print("Finished parts are kept; the same command goes on from there.", file=sys.stderr)
            raise
    if complete and (generation.ledger.concluded or rank == 0):
        print(f"{request.count} images: {generation.out / NPZ}, what they are: {generation.out / SUMMARY}")
    elif not complete:
        print(f"Process {rank} is done; what is left is drawn by other processes, or by the same command again.")
    return generation.out


@hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name="generate")
def main(config: DictConfig) -> None:
    """Hydra entry point."""
    run(config)


if __name__ == "__main__":
    entry_point(main)
