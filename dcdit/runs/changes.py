"""What may change when a run goes on, and what may not."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from dcdit.checks import Natural, shown, visible
from dcdit.errors import UserError


class Kind(Enum):
    """What a changed configuration value means for a run that goes on."""

    UNSEEN = "changes nothing that is computed: not recorded"
    EFFECT = "may change, takes effect, and is recorded"
    REMARK = "may change, with a remark: the run is no longer one experiment"
    NEVER = "may not change"


KINDS: dict[str, Kind] = {
    "model": Kind.NEVER,
    "diffusion": Kind.NEVER,
    "init": Kind.NEVER,
    "alignment": Kind.NEVER,
    "seed": Kind.NEVER,
    "data.seed": Kind.NEVER,
    "callbacks.ema": Kind.NEVER,
    "callbacks.power_ema.lengths": Kind.NEVER,
    "compression": Kind.REMARK,
    "ratio": Kind.REMARK,
    "multi_budget": Kind.REMARK,
    "gates": Kind.REMARK,
    "balance_timesteps": Kind.REMARK,
    "alignment.weight": Kind.REMARK,
    "trainer.precision": Kind.REMARK,
    "trainer.gradient_clip_val": Kind.REMARK,
    "data.batch_size": Kind.REMARK,
    "data.shuffle_buffer": Kind.REMARK,
    "optimizer": Kind.EFFECT,
    "optimizer.name": Kind.NEVER,  # another optimiser has another state
    "trainer": Kind.EFFECT,
    "execution": Kind.EFFECT,
    "execution.capacity": Kind.REMARK,  # which drops tokens
    "processes": Kind.EFFECT,  # which trainer.devices and trainer.num_nodes came to
    "nonfinite_limit": Kind.EFFECT,
    "data.num_workers": Kind.EFFECT,
    "data.corrupt_limit": Kind.EFFECT,
    "callbacks.power_ema.every_n_steps": Kind.EFFECT,
    "callbacks.power_ema.keep": Kind.EFFECT,
    "callbacks.checkpoint.every_n_steps": Kind.EFFECT,
    "callbacks.checkpoint.keep": Kind.EFFECT,
    "callbacks.checkpoint.milestone_every": Kind.EFFECT,
    "alignment.weights": Kind.UNSEEN,  # where they lie; what they are is compared by itself
    "alignment.features": Kind.EFFECT,
    "init.checkpoint": Kind.UNSEEN,  # where the weights lie; what they are is compared by itself
    "init.teacher": Kind.UNSEEN,
    "init.assume": Kind.UNSEEN,
    "callbacks": Kind.UNSEEN,
    "cluster": Kind.UNSEEN,
    "ckpt_path": Kind.UNSEEN,
    "data": Kind.UNSEEN,  # what the latents are is compared by itself, wherever they lie
    "logger": Kind.UNSEEN,
    "match_compute": Kind.UNSEEN,  # which comes to trainer.max_steps
    "paths": Kind.UNSEEN,
    "plugins": Kind.UNSEEN,  # which only says where the named choices come from
    "resolution": Kind.UNSEEN,  # whose values stand in the model
    "resume": Kind.UNSEEN,
    "run_dir": Kind.UNSEEN,
    "run_id": Kind.UNSEEN,
    "run_name": Kind.UNSEEN,
}
"""By the key, or the section that holds it; the longest that fits decides."""

EXPERIMENT = ("compression", "ratio", "multi_budget", "gates", "optimizer")
"""What may change when it is asked for, but not by ``ckpt_path=auto``: a sweep's directories are named by what varies
in it, and the next sweep may vary something else."""


@dataclass(frozen=True)
class Change:
    """A value that a run took up when it went on.

    Attributes:
        step: the last optimiser step with the value before.
        key: of the configuration.
        before, now: as a user would write them.
    """

    step: Natural
    key: str
    before: str
    now: str

    def describe(self) -> str:
        """The change in a sentence for users."""
        return f"{self.key}={self.now} from step {self.step} on, {self.before} before"


def kind_of(key: str) -> Kind:
    """The kind of a configuration value; UserError if there is no such key."""
    section = key
    while section not in KINDS:
        section, dot, _ = section.rpartition(".")
        if not dot:
            raise UserError(f"settings: the run was recorded with {shown(key)}, which no configuration has")
    return KINDS[section]


def values_to_record(values: Mapping[str, object]) -> dict[str, object]:
    """The values of a training configuration that a run depends on, by key; no paths, names or accounts."""
    return {
        key: value for key, value in leaves(values) if kind_of(key) is not Kind.UNSEEN and not key.endswith("._target_")
    }


def leaves(values: Mapping[str, object], path: str = "") -> Iterator[tuple[str, object]]:
    """The single values in nested mappings, by their keys."""
    for key, value in values.items():
        where = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping):
            yield from leaves(value, where)
        else:
            yield where, value


def changes(before: Mapping[str, object], now: Mapping[str, object], step: int, automatic: bool) -> tuple[Change, ...]:
    """What differs between what :func:`values_to_record` returned then and returns now.

    Args:
        before, now: by key.
        step: that the run has come to.
        automatic: whether the run goes on because there is one (``ckpt_path=auto``), and not because somebody said so.

    Raises:
        UserError: naming both values, if one may not change, or is of a key that nobody knows.
    """
    changed = []
    for key in {**now, **before}:
        if before.get(key) == now.get(key):
            continue
        change = Change(step, key, shown(before.get(key)), shown(now.get(key)))
        try:
            kind = kind_of(key)
        except UserError:
            raise UserError(
                f"{visible(key)}={change.before} was recorded of the run, and this release has no such key: go on with"
                " the release that trained it, or start another run with run_name=..."
            ) from None
        if kind is Kind.NEVER:
            raise UserError(
                f"{key}={change.now}: the run was trained with {change.before} up to step {step}, and cannot go on with"
                f" another value. Set {key}={change.before}, or start another run with run_name=..., which"
                " init=weights init.checkpoint=... gives these weights"
            )
        if automatic and key.split(".")[0] in EXPERIMENT:
            raise UserError(
                f"{key}={change.now}: the run was trained with {change.before} up to step {step}, and ckpt_path=auto"
                " does not go on with another experiment. Take another run_name, or, to train on with the new value,"
                " ckpt_path=last"
            )
        changed.append(change)
    return tuple(changed)


def describe_changes(changed: tuple[Change, ...]) -> str:
    """Say which values changed, and whether that makes it another experiment; empty if none did."""
    if not changed:
        return ""
    lines = [f"Going on with other values than before: {'; '.join(change.describe() for change in changed)}."]
    mixed = [change.key for change in changed if kind_of(change.key) is Kind.REMARK]
    if mixed:
        lines.append(f"From here on this is another experiment ({', '.join(mixed)}): its figures stand for a mixture.")
    return "\n".join(lines)
