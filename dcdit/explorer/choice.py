"""What a person may choose on the explorer's page: it becomes a configuration, and a command for a terminal."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from dcdit.checks import Bounds, DropFraction, Natural, NonNegative, Positive, Seed, checked
from dcdit.diffusion.settings import SAMPLERS, Steps
from dcdit.errors import UserError
from dcdit.sampling.settings import SamplingConfig

Meet = Literal["drop", "schedule", "fraction", "tflops"]
"""What sets the budget: a drop fraction, one that follows the timesteps, a fraction of the full cost, or TFLOPs."""
_NOISE = 1000
"""The timestep of pure noise; 999 of DDPM is as good as that."""

GuidanceScale = Annotated[float, Bounds(0, 20, hint="1 is no guidance, 2 to 4 make the class clearer")]


@checked
@dataclass(frozen=True)
class Choice:
    """The settings of one image.

    Attributes:
        label: number of its class.
        scale: guidance scale.
        meet: what sets the budget; the fields for others are without effect.
        drop: drop fraction, of ``drop``; of ``schedule`` the one among pure noise.
        drop_last: of ``schedule`` the one at the image.
        by: what meets the budgets ``fraction`` and ``tflops``: drops, reuse of features, or both.
        guiding_drop: drop fraction of the guiding branch; None for that of the main one.
        weak: how the guiding branch leaves the backbone out; None if it does not.
        cache: threshold of feature caching; 0 for none.
    """

    label: Natural
    seed: Seed
    sampler: str
    steps: Steps
    scale: GuidanceScale
    meet: Meet = "drop"
    drop: DropFraction = 0.0
    drop_last: DropFraction = 0.0
    fraction: Annotated[float, Bounds(0, 1, open_low=True, hint="0.6 asks for 60% of the full cost")] = 1.0
    tflops: Positive = 1.0
    by: Literal["drop", "cache", "both"] = "both"
    guiding_drop: DropFraction | None = None
    weak: Literal["path", "path_class"] | None = None
    cache: NonNegative = 0.0

    @property
    def at_full_budget(self) -> "Choice":
        """The same without any drop or reuse."""
        return Choice(self.label, self.seed, self.sampler, self.steps, self.scale)

    def sections(self) -> dict[str, dict[str, Any]]:
        """What differs from the defaults of sampling."""
        guidance: dict[str, Any] = {"scale": self.scale}
        budget: dict[str, Any] = {}
        if self.meet == "drop":
            guidance["drop_fraction"] = self.drop
        elif self.meet == "schedule":
            guidance["drop_schedule"] = [[_NOISE, self.drop], [0, self.drop_last]]
        else:
            budget = {self.meet: getattr(self, self.meet), "by": self.by}
        if self.scale != 1 and self.guiding_drop is not None:
            guidance["uncond_drop_fraction"] = self.guiding_drop
        if self.scale != 1 and self.weak is not None:
            guidance["weak"] = self.weak
        return {"sampler": {"steps": self.steps, "cache": self.cache}, "guidance": guidance, "budget": budget}

    def config(self, base: Mapping[str, Any]) -> SamplingConfig:
        """The configuration of sampling: ``base``, plain values of a composed one, changed in what was chosen.

        Raises:
            UserError: naming the value and the remedy.
        """
        if self.sampler not in SAMPLERS:
            raise UserError(f"sampler={self.sampler!r} is not one of {', '.join(SAMPLERS)}")
        chosen = self.sections()
        clip = {"clip": base["sampler"].get("clip", False)}
        sampler = {**clip, **self._own(base), **chosen["sampler"], "name": self.sampler}
        values = {**base, "seed": self.seed, "sampler": sampler}
        values |= {name: {**base[name], **chosen[name]} for name in ("guidance", "budget")}
        return SamplingConfig.of(values)

    def _own(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """Keys that only some samplers have, such as ``shift``, where the command named this one."""
        given = base["sampler"] if base["sampler"]["name"] == self.sampler else {}
        others = {key: value for key, value in given.items() if key not in ("name", "steps", "clip", "cache")}
        return {key: value for key, value in others.items() if value is not None}

    def command(self, base: Mapping[str, Any], checkpoint: str, out: str) -> str:
        """The command for a terminal that makes the same image in the folder ``out``; ``base`` as of :meth:`config`."""
        overrides = [f"checkpoint={checkpoint}", f"classes=[{self.label}]", "per_class=1", f"seed={self.seed}"]
        overrides += [f"out={out}", f"sampler={self.sampler}", f"sampler.steps={self.steps}"]
        overrides += [f"sampler.{key}={_value(value)}" for key, value in self._own(base).items()]
        overrides += ["sampler.clip=true"] if base["sampler"].get("clip") else []
        overrides += [f"sampler.cache={self.cache:g}"] if self.cache else []
        for name in ("guidance", "budget"):
            overrides += [f"{name}.{key}={_value(value)}" for key, value in self.sections()[name].items() if value]
        return " ".join(["dcdit", "sample", *map(shlex.quote, overrides)])


def _value(value: Any) -> str:
    """As a person writes it on a command line."""
    if isinstance(value, list):
        return f"[{','.join(map(_value, value))}]"
    return value if isinstance(value, str) else f"{value:g}"
