"""Averages of weights whose length is chosen after training (EDM2, arXiv 2312.02696, section 3).

An average of relative length sigma after t steps weighs the weights of step tau by the power function
p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1), whose standard deviation is sigma t. A training run keeps a few of them,
and copies of these on the way, the snapshots; any other length is the combination of snapshots whose profile comes
closest.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from dcdit.checkpoints.settings import Length
from dcdit.checks import Digest, Natural, conform
from dcdit.errors import UserError
from dcdit.runtime.files import file_digest, replacing
from dcdit.runtime.tensors import check_shapes, read_tensors, shapes_of

FOLDER, STATE = "averages", "PowerEMA"
"""Names of the folder of snapshots in a run's directory, and of the averages' state among a checkpoint's callbacks."""

Floats = NDArray[np.float64]

_NAME = re.compile(r"step_(\d{8})\.safetensors")


def exponent(length: float) -> float:
    """Exponent gamma of the power function whose relative length is sigma (EDM2, section 3).

    sigma^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).
    """
    inverse = length**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(roots.real.max())


def decay(step: int, gamma: float) -> float:
    """Weight of the previous average at optimiser step ``step``, which counts from 1 (EDM2, section 3)."""
    return float((1 - 1 / step) ** (gamma + 1))


def _overlap(steps: Floats, gammas: Floats, step: Floats, gamma: Floats) -> Floats:
    """Inner products of the profiles of two sets of averages: the integral of p p' from 0 to the earlier step."""
    ratio = np.minimum(steps, step)
    own, other = (ratio / steps) ** (gammas + 1), (ratio / step) ** (gamma + 1)
    return (gammas + 1) * (gamma + 1) / (gammas + gamma + 1) * own * other / ratio


def coefficients(averages: Sequence[tuple[int, float]], step: int, length: float) -> tuple[Floats, float]:
    """Coefficients that combine averages into another one, by least squares of the difference of profiles.

    They add to 1, which EDM2 does not ask for: otherwise what all weights have in common would be scaled a little.

    Args:
        averages: step and relative length of each average that exists.
        step, length: step and relative length of the average that is wanted.

    Returns:
        A coefficient for each average, and the relative error of the profile: 0 is exact, 1 is useless.
    """
    steps = np.array([known_step for known_step, _ in averages], float)
    gammas = np.array([exponent(known_length) for _, known_length in averages])
    wanted = np.array([float(step)]), np.array([exponent(length)])
    among = _overlap(steps[:, None], gammas[:, None], steps[None], gammas[None])
    towards = _overlap(steps, gammas, *wanted)
    one, scale = np.ones((len(steps), 1)), among.max()  # of the multiplier that holds the sum
    system = np.block([[among, scale * one], [scale * one.T, np.zeros((1, 1))]])
    solution = np.linalg.lstsq(system, np.append(towards, scale), rcond=1e-14)[0][:-1]
    whole = float(_overlap(*wanted, *wanted)[0])
    left = whole - 2 * solution @ towards + solution @ among @ solution
    return solution, float(np.sqrt(max(0.0, left) / whole))


def snapshot_name(step: int) -> str:
    """File name of the snapshot at an optimiser step."""
    return f"step_{step:08d}.safetensors"


def snapshots_in(folder: Path) -> dict[int, Path]:
    """The snapshots in a folder by optimiser step."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return {int(match[1]): path for path in files if (match := _NAME.fullmatch(path.name)) and path.is_file()}


def write_snapshot(path: Path, averages: Mapping[float, Mapping[str, Tensor]]) -> str:
    """Write averages by length; returns the digest of the file. UserError if it cannot be written."""
    tensors = {
        f"{length:g}/{name}": tensor.cpu().contiguous()
        for length, state in averages.items()
        for name, tensor in state.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    content = save(tensors)
    with replacing(path) as file:
        file.write(content)
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class PowerAverages:
    """The averages that a run kept up to one of its checkpoints.

    Attributes:
        step: optimiser steps of the checkpoint.
        tracked: averages at that step, by relative length: parameters by name.
        folder: folder of the snapshots before that step.
        digests: digests of the snapshots' files, by step. A file that the checkpoint does not name is not used.
    """

    step: int
    tracked: Mapping[float, Mapping[str, Tensor]]
    folder: Path
    digests: Mapping[int, str]

    @classmethod
    def of_checkpoint(cls, values: Mapping[str, Any], step: int, folder: Path) -> "PowerAverages | None":
        """Read the averages in a checkpoint of ``dcdit.train``; None if it holds none.

        Raises:
            UserError: if they are not as training writes them.
        """
        state = conform("callbacks", values.get("callbacks", {}), dict[str, Any]).get(STATE)
        if state is None:
            return None
        kept = conform(STATE, state, dict[str, Any])
        averages = conform("averages", kept.get("averages"), dict[str, dict[str, Tensor]])
        if conform("step", kept.get("step"), Natural) != step:
            raise UserError(f"{STATE}.step is {kept['step']}, the checkpoint's {step}")
        digests = conform("snapshots", kept.get("snapshots"), dict[str, Digest])
        return cls(
            step,
            {conform("averages", length, Length): average for length, average in averages.items()},
            folder,
            {conform("snapshots", number, Natural): digest for number, digest in digests.items()},
        )

    def _snapshots(self) -> dict[int, Path]:
        """The snapshots before the checkpoint that it names, by step."""
        files = snapshots_in(self.folder).items()
        return {step: path for step, path in files if step in self.digests and 0 < step < self.step}

    def _known(self) -> list[tuple[int, float]]:
        """Step and relative length of each average that exists."""
        return [(step, length) for step in (self.step, *self._snapshots()) for length in self.tracked]

    def describe_match(self, length: float) -> str:
        """Say how many averages are combined for this relative length, and how far the profile is off."""
        known = self._known()
        error = coefficients(known, self.step, length)[1]
        rough = ": a rough match, lengths nearer to those that were kept are better" if error > 0.05 else ""
        return f"of {len(known)} averages, {error:.1%} off in profile{rough}"

    def at(self, length: float) -> dict[str, Tensor]:
        """Combine the average of another relative length at the same step: parameters by name, float32.

        Raises:
            UserError: if a snapshot is damaged, of another step or of another network.
        """
        known, snapshots = self._known(), self._snapshots()
        weights = dict(zip(known, coefficients(known, self.step, length)[0], strict=True))
        shapes = shapes_of(next(iter(self.tracked.values())))
        total = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
        for step in (self.step, *snapshots):
            averages = self.tracked if step == self.step else self._read(snapshots[step], step, shapes)
            for known_length, state in averages.items():
                for name, tensor in state.items():
                    total[name].add_(tensor.double(), alpha=float(weights[step, known_length]))
        return {name: tensor.float() for name, tensor in total.items()}

    def _read(self, path: Path, step: int, shapes: Mapping[str, torch.Size]) -> dict[float, dict[str, Tensor]]:
        """Read the snapshot of ``step`` and check that it is unchanged, of this network and these lengths."""
        if file_digest(path) != self.digests[step]:
            raise UserError(
                f"{path} is damaged, or not the snapshot that this run wrote at step {step}: its digest is not the one"
                " in the checkpoint. Restore it, or remove it: others may be enough"
            )
        content = read_tensors(path)
        averages: dict[float, dict[str, Tensor]] = {}
        for length in self.tracked:
            prefix = f"{length:g}/"
            averages[length] = {
                key.removeprefix(prefix): tensor for key, tensor in content.items() if key.startswith(prefix)
            }
            try:
                check_shapes(shapes_of(averages[length]), shapes)
            except UserError as error:
                raise UserError(f"{path}, length {length:g}: {error}: remove it, others may be enough") from error
        return averages
