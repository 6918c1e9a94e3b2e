"""What a user may say about a checkpoint of another program, which it cannot say itself. No torch here."""

from dataclasses import asdict, dataclass
from typing import Literal

from dcdit.checks import NonNegative, Positive, Size, checked
from dcdit.errors import UserError


@checked
@dataclass(frozen=True)
class AssumeSettings:
    """What no shape tells; None takes what is published.

    Attributes:
        heads: attention heads; published for widths 384, 768, 1024 and 1152.
        smoothing_sigma: de-chunk smoothing in grid positions, 0 for none; published: 1, or 2 on a 64 x 64 grid.
        freq_shift: of the timestep embedding: 0 as published; 1 is what diffusers' DiT computes, whatever its weights
            were trained with.
        autoencoder: of the latents; published: ``stabilityai/sd-vae-ft-ema``.
        scale, shift: the network sees (latent - shift) * scale; published: 0.18215 and 0.
    """

    heads: Size | None = None
    smoothing_sigma: NonNegative | None = None
    freq_shift: Literal[0, 1] | None = None
    autoencoder: str | None = None
    scale: Positive | None = None
    shift: float | None = None

    def check_unused(self, kind: str) -> None:
        """Raise :class:`UserError` if something is given that a ``kind`` of checkpoint says itself."""
        given = {key: value for key, value in asdict(self).items() if value is not None}
        if given:
            key, value = next(iter(given.items()))
            raise UserError(f"assume.{key}={value}: this {kind} says itself what it is, leave assume out")


AS_PUBLISHED = AssumeSettings()
