"""Move a budget and see what it does, in the browser: ``python -m dcdit.explore``, or with ``checkpoint=runs/b_n4``.

Opens a page that this machine serves to itself: class and seed, drop fraction or budget, sampler, guidance and caching
for two images side by side, where the router put its tokens at every timestep, what it cost, and what it lost.
"""

import os
import sys
import webbrowser
from contextlib import suppress
from dataclasses import dataclass
from threading import Event
from typing import Annotated, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dcdit.checks import Bounds, Matches, call_checked, checked
from dcdit.diffusion.settings import Steps
from dcdit.errors import UserError
from dcdit.sampling.settings import SamplingPlan
from dcdit.settings.entry import entry_point, hold, plain
from dcdit.settings.published import CONFIG_DIR


@checked
@dataclass(frozen=True)
class ExploreSettings:
    """What to serve, and to whom: the keys of ``configs/explore.yaml`` that are its own.

    Attributes:
        compare: another checkpoint for the image on the right; None for the same.
        host: address that the page is served at; the default answers this machine alone.
        port: None takes the first free one from 7860.
        share: a public address of Gradio's as well.
        browser: open one.
        most_steps: that the page lets anyone ask for.
    """

    compare: str | None
    host: Annotated[str, Matches(r"[\w.:-]+", "an address, such as 127.0.0.1, or 0.0.0.0 for everyone")]
    port: Annotated[int, Bounds(1, 65_535)] | None
    share: bool
    browser: bool
    most_steps: Steps


def check(config: DictConfig) -> tuple[SamplingPlan, ExploreSettings, dict[str, Any]]:
    """What ``config`` asks for, and its plain values; UserError if a value is wrong, before anything is loaded."""
    values = plain(config)
    plan, own = SamplingPlan.of(values)
    base = {key: value for key, value in values.items() if key not in own}
    settings = call_checked(ExploreSettings, own, "")
    guidance = plan.guidance
    chosen_there = guidance.drop_schedule is not None or guidance.drop_fraction or guidance.uncond_drop_fraction
    if plan.budget.given or chosen_there:
        raise UserError(
            "budget, guidance.drop_fraction, uncond_drop_fraction and drop_schedule are what the page chooses: leave"
            " them out"
        )
    if guidance.scale == 1 and guidance.weak_checkpoint is not None:
        raise UserError("guidance.weak_checkpoint needs guidance.scale above 1")
    return plan, settings, base


_HELD = (
    *("assume.", "weights=", "device=", "precision=", "autoencoder=", "rounding=", "compile=", "batch_size="),
    *("guidance.channels=", "guidance.interval=", "guidance.weak"),
)
"""Beginnings of words that hold for every image of the page, and so stand in the commands that it shows."""


def run(config: DictConfig) -> None:
    """Serve the page until interrupted."""
    plan, settings, base = check(config)
    from dcdit.checkpoints.resolve import resolve_checkpoint

    names = {"checkpoint": plan.settings.checkpoint, "compare": settings.compare}
    places = [resolve_checkpoint(name, plan.runs, key) for key, name in names.items() if name is not None]
    try:
        from dcdit.explorer.page import Page, serving
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "gradio":
            raise
        raise UserError("the explorer needs Gradio: pip install 'dcdit[explore]'") from None
    from dcdit.explorer.session import Session

    words = " ".join(word for word in HydraConfig.get().overrides.task if word.startswith(_HELD))
    session = Session(plan, base, places, settings.most_steps, words)
    title = f"dcdit: {' and '.join(place.name for place in places)}"
    page = Page(session, title).blocks(base)
    with suppress(KeyboardInterrupt), serving(page, settings.host, settings.port, settings.share) as address:
        print(f"The explorer is at {address}   (Ctrl-C ends it)", flush=True)
        if _opens(settings.browser):
            webbrowser.open(address)
        Event().wait()


def _opens(wanted: bool) -> bool:
    """Whether there is a screen to open a browser on: in a terminal alone, one would take the terminal."""
    return wanted and (sys.platform in ("darwin", "win32") or bool({"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)))


@hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name="explore")
def main(config: DictConfig) -> None:
    """Hydra entry point."""
    hold(run, config)


if __name__ == "__main__":
    entry_point(main)
