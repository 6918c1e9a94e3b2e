"""Named tensors: read from safetensors files, compared by shape, and loaded into modules."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dcdit.checks import reason_of, visible
from dcdit.errors import UserError
from dcdit.runtime.files import file_digest, open_regular
from dcdit.runtime.limits import HEADER_BYTES


def read_tensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Read the tensors of a ``.safetensors`` file by name; floating-point ones become float32.

    Raises:
        UserError: if the file is missing, damaged or not a regular file, holds complex or non-finite numbers, or has
            another digest than ``sha256``.
    """
    try:
        with open_regular(path) as file:
            header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > HEADER_BYTES:
            raise ValueError(f"its header says to have {header_bytes} bytes, at most {HEADER_BYTES} are read")
        if sha256 is not None and file_digest(path) != sha256:
            raise ValueError("its digest is not the one in config.json")
        tensors = load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: the folder lacks its weights") from None
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged or no safetensors file ({reason_of(error)}): download or export it again"
        ) from error
    for name, tensor in tensors.items():
        if tensor.is_complex():
            raise UserError(f"{path}: {name} holds complex numbers, which no network here has")
        if tensor.is_floating_point():
            tensors[name] = tensor.float()
            if not bool(tensors[name].isfinite().all()):
                raise UserError(f"{path} is no trained network: {name} is not finite")
    return tensors


def load_state_strict(module: nn.Module, state: Mapping[str, Tensor], assign: bool = False) -> None:
    """Load ``state`` into ``module``: names, shapes and kinds of numbers must agree, and all numbers be finite.

    With ``assign`` it takes over the tensors themselves, for a module that was built without memory.

    Raises:
        UserError: naming the first parameter that is missing, unknown, of another shape, or not finite.
    """
    own = module.state_dict()
    check_shapes(shapes_of(state), shapes_of(own))
    for name, tensor in state.items():
        if tensor.is_complex() or tensor.is_floating_point() != own[name].is_floating_point():
            raise UserError(f"parameter {name} has numbers of {tensor.dtype}, the network needs {own[name].dtype}")
    module.load_state_dict(state, assign=assign)
    for name, tensor in module.state_dict().items():  # of the module: its type may have a smaller range
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(f"parameter {name} is not finite")


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Return the shape of each tensor in ``state``, by name."""
    return {name: tensor.shape for name, tensor in state.items()}


def differing_shapes(
    shapes: Mapping[str, torch.Size], expected: Mapping[str, torch.Size]
) -> list[tuple[str, str, str]]:
    """Name, shape and expected shape of each tensor whose two shapes differ; a missing shape is ``none``."""

    def describe(shape: torch.Size | None) -> str:
        return "none" if shape is None else str(list(shape))

    return [
        (name, describe(shapes.get(name)), describe(expected.get(name)))
        for name in {**expected, **shapes}
        if shapes.get(name) != expected.get(name)
    ]


def describe_differences(differing: Sequence[tuple[str, str, str]], most: int = 3) -> str:
    """Say which parameters a file has and a network lacks, which it lacks, and which have another shape.

    Args:
        differing: what :func:`differing_shapes` returned of the shapes in the file and those of the network.
        most: parameters that are named of each kind.
    """
    kinds = {
        "the file has {}, which the network lacks": [name for name, _, expected in differing if expected == "none"],
        "the network has {}, which the file lacks": [name for name, shape, _ in differing if shape == "none"],
        "the file has {}": [
            f"{name} of shape {shape} (the network: {expected})"
            for name, shape, expected in differing
            if "none" not in (shape, expected)
        ],
    }
    return "; ".join(
        text.format(", ".join(map(visible, found[:most])) + (f" and {len(found) - most} more" if found[most:] else ""))
        for text, found in kinds.items()
        if found
    )


def check_shapes(shapes: Mapping[str, torch.Size], expected: Mapping[str, torch.Size]) -> None:
    """Raise :class:`UserError` with the first difference unless ``shapes``, by name, are the ``expected`` ones."""
    for name, shape, expected_shape in differing_shapes(shapes, expected):
        raise UserError(f"parameter {name} has shape {shape}, the network that is described needs {expected_shape}")
