"""The explorer's page, and what happens on it. Everything it shows comes from this machine."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event
from typing import Annotated, Any

import gradio as gr

from dcdit.checks import Bounds, conform, shown, visible
from dcdit.errors import UserError
from dcdit.explorer import view
from dcdit.explorer.controls import EVENT, SILENT, ImageRequest, draw_controls, request_of
from dcdit.explorer.session import GeneratedImage, OnProgress, Session, StoppedError
from dcdit.sampling.overlays import save_animation

Shown = tuple[tuple[ImageRequest, GeneratedImage], ...]
"""What a browser sees: of A and B the request and the image; nothing before the first images."""

_ABOUT = (
    "A router keeps those positions of the grid as tokens that their neighbourhood does not predict; the transformer"
    " runs on them alone. A drop fraction ρ leaves out that share of them, the least certain ones.\n\n"
    "1. **Move ρ of B**, and compare the two images and their GFLOPs.\n"
    "2. **Move the time** below the table: orange positions ran, blue ones were left out.\n"
    "3. Open *more* for guidance, caching and samplers. All of it is computed on this machine."
)
_FORMS = ["GIF", "WebP"]
_WAITING = 16
"""Jobs that may wait for their turn; more are refused in words."""
_OUTPUTS = 8
"""Values that :meth:`Page.update` returns."""
_SAMPLING: dict[str, Any] = {
    "concurrency_id": "sampling",
    "concurrency_limit": 1,
    "trigger_mode": "always_last",
    **EVENT,
}
"""Options of the events that sample: one at a time."""


def _report(on_progress: OnProgress, name: str, done: int, steps: int, what: str) -> None:
    """Report a step of A or B."""
    on_progress(done, steps, f"{name}: {what}")


def _next_seed(seed: Any) -> int:
    """Another seed than that in the field, whatever stands there."""
    return (int(seed) + 1) % 2**31 if isinstance(seed, int | float) and abs(seed) < 2**63 else 0


class Page:
    """The page, and what happens on it.

    Args:
        session: the checkpoints, which sample.
        title: title of the page.
    """

    def __init__(self, session: Session, title: str) -> None:
        self.session, self.title = session, visible(title)
        self._jobs: dict[str, Event] = {}
        """The running job of each browser: set when it is to stop."""

    @contextmanager
    def _job(self, request: gr.Request) -> Iterator[OnProgress]:
        """A job of a browser: tells its page how far it is, and ends where that asks for it."""
        browser, stopped, progress = str(request.session_hash), Event(), gr.Progress()
        self._jobs[browser] = stopped

        def report(done: int, steps: int, what: str) -> None:
            if stopped.is_set():
                raise StoppedError("Stopped.")
            progress((done, steps), desc=what, unit="steps")

        try:
            yield report
        finally:
            self._jobs.pop(browser, None)

    def stop(self, request: gr.Request) -> None:
        """End the job of this browser, which asks for that or has gone, at its next step."""
        job = self._jobs.get(str(request.session_hash))
        if job is not None:
            job.set()

    def update(self, request: gr.Request, known: Shown, label: Any, seed: Any, *values: Any) -> list[Any]:
        """Sample each side that requests another image than it shows."""
        half, shown_images = len(values) // 2, dict(known)
        pairs: list[tuple[ImageRequest, GeneratedImage]] = []
        try:
            with self._job(request) as on_progress:
                for name, side_values in zip(view.NAMES, (values[:half], values[half:]), strict=True):
                    wanted = request_of(name, len(self.session.sources), label, seed, side_values)
                    generated = shown_images.get(wanted) or self.session.generate(
                        *wanted, partial(_report, on_progress, name)
                    )
                    pairs.append((wanted, generated))
        except (StoppedError, UserError) as error:
            kept = " The page shows what was there before." if isinstance(error, StoppedError) else ""
            return [gr.skip()] * (_OUTPUTS - 1) + [view.message(f"{error}{kept}")]
        images, classes, commands = [generated for _, generated in pairs], [], []
        for name, ((number, choice), _) in zip(view.NAMES, pairs, strict=True):
            classes.append(self.session.classes(number)[choice.label])
            commands.append(self.session.command(number, choice, f"explored/{name}"))
        return [
            tuple(pairs),
            *map(view.image, view.NAMES, images, classes),
            view.difference_of(*images),
            view.numbers(images),
            view.downloads(images),
            "\n".join(commands),
            view.message("Done.", problem=False),
        ]

    def course(self, known: Shown, time: float) -> list[str]:
        """How both images came about: one evaluation of each, and the curves."""
        return [*self.moments(known, time), view.curves([generated for _, generated in known]) if known else ""]

    def moments(self, known: Shown, time: float) -> list[str]:
        """One evaluation of each side, at a time between 0, noise, and 100, the image."""
        try:
            time = conform("time", time, Annotated[float, Bounds(0, 100)])
        except UserError as error:
            return [view.message(str(error)), ""]
        pairs = zip(view.NAMES, known, strict=False)
        return [view.moment(name, generated, time / 100) for name, (_, generated) in pairs] or ["", ""]

    def strip(self, request: gr.Request, label: Any, seed: Any, *values: Any) -> str:
        """The same seed at seven budgets, by the other settings of A."""
        try:
            wanted = request_of("A", len(self.session.sources), label, seed, values)
            with self._job(request) as on_progress:
                return view.strip(self.session.strip(*wanted, on_progress))
        except (StoppedError, UserError) as error:
            return view.message(str(error))

    def animate(self, known: Shown, form: str) -> list[str]:
        """Both sides as animations."""
        if form not in _FORMS:
            return [view.message(f"animation={shown(form)} is not one of {', '.join(_FORMS)}"), ""]
        animations = []
        with tempfile.TemporaryDirectory() as folder:
            for name, (_, generated) in zip(view.NAMES, known, strict=False):
                file = Path(folder) / f"{name}.{form.lower()}"
                save_animation(generated.animation(), file)
                animations.append(view.animated(name, generated, file))
        return animations or [view.message("There is no image yet.")] * 2

    def blocks(self) -> gr.Blocks:
        """Draw the page, and connect its controls, which begin with the session's configuration, with what happens."""
        with gr.Blocks(title=self.title, analytics_enabled=False, fill_width=True) as page:
            gr.HTML(view.heading(self.title))
            gr.Markdown(_ABOUT)
            known = gr.State((), time_to_live=3600)
            with gr.Row(elem_id="images"):
                images = [gr.HTML(elem_id=f"image_{name}", min_height=120) for name in view.NAMES]
                between = gr.HTML(elem_id="difference")
            with gr.Row():
                with gr.Column(scale=2, min_width=280):
                    settings, seeded = self._draw_settings()
                    status = gr.HTML(elem_id="status", min_height=70)
                    gr.Button("stop", size="sm", elem_id="stop").click(self.stop, queue=False, **SILENT)
                with gr.Column(scale=5, min_width=280):
                    numbers = gr.HTML(elem_id="numbers")
                    time, course = self._draw_course(known)
                    downloads = gr.HTML(elem_id="downloads")
                    label = "the same images from a terminal, A then B"
                    commands = gr.Textbox(label=label, lines=2, elem_id="commands")
                    self._draw_pictures(known, settings)  # last: what it draws into is empty at first
            inputs = [known, *settings]
            outputs = [known, *images, between, numbers, downloads, commands, status]
            assert len(outputs) == _OUTPUTS
            # A slider that a browser brings back within its bounds has changed, though nobody moved it.
            changed = [control.change if isinstance(control, gr.Slider) else control.input for control in settings]
            for updated in (
                gr.on([page.load, *changed], self.update, inputs, outputs, show_progress_on=status, **_SAMPLING),
                seeded.then(self.update, inputs, outputs, show_progress_on=status, **_SAMPLING),
            ):
                updated.then(self.course, [known, time], course, **SILENT)
            page.unload(self.stop)
        return page.queue(max_size=_WAITING, default_concurrency_limit=4, api_open=False)

    def _draw_settings(self) -> tuple[list[Any], Any]:
        """Draw class, seed and the controls of both sides; returns these, and the event of another seed."""
        names = [(visible(name), number) for number, name in enumerate(self.session.classes(0))]
        with gr.Group():
            label = gr.Dropdown(names, value=0, label="class", elem_id="label")
            seed = gr.Number(self.session.config.seed, label="seed", precision=0, elem_id="seed")
            another = gr.Button("another seed", size="sm", elem_id="another")
        sides = [draw_controls(name, self.session, drop) for name, drop in zip(view.NAMES, (0, 0.5), strict=True)]
        return [label, seed, *sides[0], *sides[1]], another.click(_next_seed, seed, seed, **SILENT)

    def _draw_course(self, known: Any) -> tuple[Any, list[Any]]:
        """Draw how the images came about; returns the slider of time, and what :meth:`course` changes."""
        time = gr.Slider(
            0, 100, 60, step=1, label="time: 0 is noise (t = 1000), 100 the image (t = 0)", elem_id="place"
        )
        moments = [gr.HTML(elem_id=f"moment_{name}") for name in view.NAMES]
        time.input(self.moments, [known, time], moments, trigger_mode="always_last", **SILENT)
        return time, [*moments, gr.HTML(elem_id="curves")]

    def _draw_pictures(self, known: Any, settings: list[Any]) -> None:
        """Draw what is made on request: the strip of seven budgets, and the animations."""
        routes = any(map(self.session.routes, range(len(self.session.sources))))
        with gr.Row():
            seven = gr.Button("same seed at seven budgets", elem_id="seven", visible=routes)
            form = gr.Radio(_FORMS, value=_FORMS[0], label="animation as")
            move = gr.Button("animate A and B", elem_id="animate")
        strip = gr.HTML(elem_id="strip")
        with gr.Row():
            animations = [gr.HTML(elem_id=f"animation_{name}") for name in view.NAMES]
        of_a = settings[: len(settings) // 2 + 1]  # class, seed, and the first of two sides
        seven.click(self.strip, of_a, strip, show_progress_on=strip, **_SAMPLING)
        move.click(self.animate, [known, form], animations, concurrency_limit=1, **EVENT)
