"""Move a budget and see what it does, in the browser: ``python -m dcdit.explore``, or with ``checkpoint=runs/b_n4``.

Opens a page that this machine serves to itself: class and seed, drop fraction or budget, sampler, guidance and caching
for two images side by side, where the router put its tokens at every timestep, what it cost, and what it lost.
"""

import os
import sys
import webbrowser
from contextlib import suppress
from threading import Event
from typing import Annotated

from dcdit.checks import Bounds, Matches, config
from dcdit.diffusion.settings import Steps
from dcdit.errors import UserError
from dcdit.runtime.imports import check_installed
from dcdit.sampling.settings import SamplingConfig
from dcdit.settings.command import command
from dcdit.settings.compose import given_overrides


@config
class ExploreConfig(SamplingConfig):
    """The configuration of ``dcdit.explore``; ``configs/explore.yaml`` describes each key."""

    compare: str | None
    host: Annotated[str, Matches(r"[\w.:-]+", "an address, such as 127.0.0.1, or 0.0.0.0 for everyone")]
    port: Annotated[int, Bounds(1, 65_535)] | None
    share: bool
    names: list[Annotated[str, Matches(r"[\w.-]+", "a name, such as explorer.example.org")]]
    browser: bool
    most_steps: Steps

    def __post_init__(self) -> None:
        super().__post_init__()
        guidance = self.guidance
        chosen_there = guidance.drop_schedule is not None or guidance.drop_fraction or guidance.uncond_drop_fraction
        if self.budget.given or chosen_there:
            raise UserError(
                "budget, guidance.drop_fraction, uncond_drop_fraction and drop_schedule are what the page chooses:"
                " leave them out"
            )
        if self.capacity is not None:
            raise UserError(
                f"capacity={self.capacity}: it bounds the tokens of a batch, and the page samples one image at a time:"
                " leave it out"
            )
        if guidance.scale == 1 and guidance.weak_checkpoint is not None:
            raise UserError("guidance.weak_checkpoint needs guidance.scale above 1")


_HELD = (
    *("assume.", "weights=", "device=", "precision=", "autoencoder=", "rounding=", "compile=", "batch_size="),
    *("guidance.channels=", "guidance.interval=", "guidance.weak"),
)
"""Beginnings of words that hold for every image of the page, and so stand in the commands that it shows."""


@command("explore")
def explore(config: ExploreConfig) -> None:
    """Serve the page until interrupted."""
    check_installed("gradio", "the explorer")
    from dcdit.checkpoints.resolve import resolve_checkpoint

    names = {"checkpoint": config.checkpoint, "compare": config.compare}
    sources = [resolve_checkpoint(name, config.paths.runs, key) for key, name in names.items() if name is not None]
    from dcdit.explorer.page import Page
    from dcdit.explorer.serving import serving
    from dcdit.explorer.session import Session

    words = " ".join(word for word in given_overrides() if word.startswith(_HELD))
    session = Session(config, sources, config.most_steps, words)
    title = f"dcdit: {' and '.join(source.name for source in sources)}"
    page = Page(session, title).blocks()
    with suppress(KeyboardInterrupt), serving(page, config.host, config.port, config.share, config.names) as address:
        print(f"The explorer is at {address}   (Ctrl-C ends it)", flush=True)
        if _opens(config.browser):
            webbrowser.open(address)
        Event().wait()


def _opens(wanted: bool) -> bool:
    """Whether there is a screen to open a browser on: in a terminal alone, one would take the terminal."""
    return wanted and (sys.platform in ("darwin", "win32") or bool({"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)))


if __name__ == "__main__":
    explore.main()
