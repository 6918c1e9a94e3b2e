"""The controls of one side of the explorer's page: they are drawn, and what a browser sends of them is read."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import gradio as gr

from dcdit.checks import Bounds, conform, visible
from dcdit.diffusion.settings import PATH_DROP
from dcdit.errors import UserError
from dcdit.explorer import view
from dcdit.explorer.choice import Choice, Meet
from dcdit.explorer.session import Session

EVENT: dict[str, Any] = {"api_visibility": "private", "preprocess": False}
"""Options of every event. Values come as they were typed: what is wrong with them we say ourselves, by name."""
SILENT: dict[str, Any] = {"show_progress": "hidden", **EVENT}

ImageRequest = tuple[int, Choice]
"""What one side requests: the number of a checkpoint, and the settings of an image."""

_BY = [("reuse and drops", "both"), ("drops alone", "drop"), ("reuse alone", "cache")]
_USED = {
    "drop": ["drop"],
    "schedule": ["drop", "drop_last"],
    "fraction": ["fraction", "by"],
    "tflops": ["tflops", "by"],
}
"""The controls that count, by what sets the budget."""
Guiding = Literal["same", "drop", "path", "path_class"]
_GUIDING: list[tuple[str, Guiding]] = [("no class, same ρ", "same"), ("no class, a ρ of its own (Lite-CFG)", "drop")]
_PATH_DROP: list[tuple[str, Guiding]] = [("no class, no backbone", "path"), ("no backbone", "path_class")]
_LABELS = {
    "drop": "drop fraction ρ",
    "schedule": "ρ that follows the timesteps",
    "drop_last": "ρ at the image",
    "fraction": "fraction of the full cost",
    "tflops": "TFLOPs per image",
    "by": "what meets that budget",
    "guiding_drop": "ρ of the guiding branch",
    "cache": "threshold of feature caching",
    "steps": "steps",
    "scale": "guidance scale",
}
"""What messages, and mostly the page too, call controls and the ways to set the budget."""


class Controls(NamedTuple):
    """The controls of A or B, or their values, in the order in which the values come."""

    checkpoint: Any
    meet: Any
    drop: Any
    drop_last: Any
    fraction: Any
    tflops: Any
    by: Any
    guiding: Any
    guiding_drop: Any
    cache: Any
    sampler: Any
    steps: Any
    scale: Any


def request_of(name: str, checkpoints: int, label: Any, seed: Any, values: Sequence[Any]) -> ImageRequest:
    """Read the request of one side.

    Args:
        name: ``A`` or ``B``, for messages.
        checkpoints: how many checkpoints there are.
        label, seed, values: what the browser sent, as it came; the values are those of :class:`Controls`.

    Raises:
        UserError: naming what is wrong.
    """
    controls = Controls(*values)
    conform(f"{name}: what sets the budget", controls.meet, Meet)
    guiding = conform(f"{name}: guiding branch", controls.guiding, Guiding)
    checkpoint = conform(f"{name}: checkpoint", controls.checkpoint, Annotated[int, Bounds(0, checkpoints - 1)])
    used = _USED[controls.meet]
    needed = ["scale", "steps", "cache", *used, *(["guiding_drop"] if guiding == "drop" else [])]
    empty = [text for text, value in (("class", label), ("seed", seed)) if value is None]
    empty += [f"{name}: {_LABELS[control]}" for control in needed if getattr(controls, control) is None]
    if empty:
        raise UserError(f"{', '.join(empty)}: there is nothing, give a value")
    choice = Choice(
        label=label,
        seed=_whole(seed),
        sampler=controls.sampler,
        steps=_whole(controls.steps),
        scale=controls.scale,
        meet=controls.meet,
        guiding_drop=controls.guiding_drop if guiding == "drop" and controls.scale != 1 else None,
        weak=guiding if guiding in PATH_DROP and controls.scale != 1 else None,
        cache=controls.cache,
        **{control: getattr(controls, control) for control in used},
    )
    return checkpoint, choice


def _whole(value: Any) -> Any:
    """A whole number that came as a fraction; anything else as it is, to be refused in words."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def draw_controls(name: str, session: Session, drop: float) -> Controls:
    """Draw the controls of side ``name``; they begin with the session's configuration, and ``drop`` if it routes."""
    several = len(session.sources) > 1
    number = view.NAMES.index(name) if several else 0
    config, most = session.config, session.most_steps
    with gr.Group():
        choices = [(visible(source.run), index) for index, source in enumerate(session.sources)]
        checkpoint = gr.Radio(choices, value=number, label=f"{name}: checkpoint", visible=several)
        first = drop if session.routes(number) else 0.0
        drop_slider = _slider(0, 0.95, first, 0.05, f"{name}: drop fraction ρ", elem_id=f"drop_{name}")
    with gr.Accordion(f"{name}: more", open=False):
        meet = gr.Radio(
            [(_LABELS[key], key) for key in _USED], value="drop", label="what sets the budget", elem_id=f"meet_{name}"
        )
        drop_last = _slider(0, 0.95, 0.0, 0.05, _LABELS["drop_last"], visible=False)
        fraction = _slider(0.05, 1, 0.7, 0.05, _LABELS["fraction"], visible=False)
        label, usual = f"{_LABELS['tflops']} (0.001 is a GFLOP)", session.usual_tflops(number)
        tflops = gr.Number(usual, label=label, visible=False, elem_id=f"tflops_{name}")
        by = gr.Radio(_BY, value="both", label=_LABELS["by"], visible=False)
        scale = _slider(1, 10, config.guidance.scale, 0.25, "guidance scale, 1 for none")
        offered = _GUIDING + (_PATH_DROP if session.drops_path else [])
        guiding = gr.Radio(offered, value="same", label="guiding branch, with guidance", elem_id=f"guiding_{name}")
        guiding_drop = _slider(0, 0.95, 0.9, 0.05, "its ρ", visible=False)
        cache = _slider(0, 2, config.sampler.cache, 0.05, "feature caching: threshold, 0 for none")
        samplers = sorted({name for index in range(len(session.sources)) for name in session.samplers(index)})
        sampler = gr.Dropdown(samplers, value=session.sampler(number), label="sampler")
        steps = _slider(2, most, min(most, config.sampler.steps), 1, "steps", elem_id=f"steps_{name}")

    def update_controls(chosen: Any) -> list[Any]:
        """Show the controls that count for what sets the budget, and hide the others."""
        label = f"{name}: ρ in noise" if chosen == "schedule" else f"{name}: drop fraction ρ"
        used = _USED.get(chosen, ["drop"]) if isinstance(chosen, str) else ["drop"]
        others = ("drop_last", "fraction", "tflops", "by")
        return [gr.update(visible="drop" in used, label=label), *(gr.update(visible=name in used) for name in others)]

    meet.input(update_controls, meet, [drop_slider, drop_last, fraction, tflops, by], **SILENT)
    guiding.input(lambda chosen: gr.update(visible=chosen == "drop"), guiding, guiding_drop, **SILENT)
    budget = (drop_slider, drop_last, fraction, tflops, by)
    return Controls(checkpoint, meet, *budget, guiding, guiding_drop, cache, sampler, steps, scale)


def _slider(low: float, high: float, value: float, step: float, label: str, **options: Any) -> Any:
    return gr.Slider(low, high, value, step=step, label=label, **options)
