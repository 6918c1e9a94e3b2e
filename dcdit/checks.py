"""Ranges of values that several parts check: each raises :class:`dcdit.errors.UserError` naming value and remedy."""

from collections.abc import Mapping

from dcdit.errors import UserError


def check_drop_fraction(drop_fraction: float, name: str = "drop_fraction") -> None:
    """Raise :class:`UserError` unless ``drop_fraction`` lies in [0, 1)."""
    if not 0 <= drop_fraction < 1:
        raise UserError(
            f"{name}={drop_fraction} is outside [0, 1): it is the share of kept tokens to drop, 0 keeps all of them,"
            " 0.9 a tenth"
        )


def check_compression(compression: float, name: str = "compression") -> None:
    """Raise :class:`UserError` unless the target compression N exceeds 1."""
    if not compression > 1:
        raise UserError(
            f"{name}={compression} must be greater than 1: N = 4 asks the router to keep a quarter of the tokens"
        )


def micro_batch(batch_size: int, processes: int, accumulate: int) -> int:
    """Samples of a process at once; :class:`UserError` unless ``batch_size`` can be split so."""
    size, rest = divmod(batch_size, processes * accumulate)
    if rest or not size:
        raise UserError(
            f"data.batch_size={batch_size} cannot be split over {processes} processes x"
            f" trainer.accumulate_grad_batches={accumulate}: take a multiple of {processes * accumulate}"
        )
    return size


def check_sizes(sizes: Mapping[str, int]) -> None:
    """Raise :class:`UserError` naming the first of ``sizes`` that is not positive."""
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{name}={size} is not a positive number")


def check_label_dropout(label_dropout: float) -> None:
    """Raise :class:`UserError` unless ``label_dropout`` is a probability below 1."""
    if not 0 <= label_dropout < 1:
        raise UserError(f"label_dropout={label_dropout} is outside [0, 1): it is a probability, 0.1 as published")
