"""The explorer's page: controls, and what they change. Everything it shows comes from this machine."""

import errno
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Annotated, Any
from urllib.parse import urlsplit

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported

import gradio as gr
import uvicorn
from fastapi import FastAPI
from gradio.networking import setup_tunnel

from dcdit.checks import Bounds, conform, shown, visible
from dcdit.errors import UserError
from dcdit.explorer import view
from dcdit.explorer.choice import Choice, Meet
from dcdit.explorer.gate import Gate, gate
from dcdit.explorer.session import GeneratedImage, OnProgress, Session, StoppedError
from dcdit.sampling.overlays import save_animation

_ABOUT = (
    "From noise to image, a router keeps those positions of the grid as tokens that their neighbourhood does not"
    " predict; the transformer runs on them alone. **Move a drop fraction ρ**: that share of the kept tokens, the"
    " router's least certain ones, is left out. You see both images, where their tokens were at every timestep, what"
    " they cost, and what the drop changed. All of it is computed on this machine."
)
_MEET = [
    ("drop fraction ρ", "drop"),
    ("ρ that follows the timesteps", "schedule"),
    ("fraction of the full cost", "fraction"),
    ("TFLOPs per image", "tflops"),
]
_BY = [("reuse and drops", "both"), ("drops alone", "drop"), ("reuse alone", "cache")]
_FORMS = ["GIF", "WebP"]
_WAITING = 16
"""Jobs that may wait for their turn; more are refused in words."""
_SESSIONS = 32
"""Browsers whose images are remembered."""


@dataclass(frozen=True)
class Controls:
    """The controls of A or B, in the order in which their values come."""

    checkpoint: Any
    meet: Any
    drop: Any
    drop_last: Any
    fraction: Any
    tflops: Any
    by: Any
    own_guiding_drop: Any
    guiding_drop: Any
    cache: Any
    sampler: Any
    steps: Any
    scale: Any

    @property
    def components(self) -> list[Any]:
        """All controls, in their order."""
        return list(vars(self).values())


@dataclass(frozen=True)
class ImageRequest:
    """What one side requests: the number of a checkpoint, and the settings of an image."""

    checkpoint: int
    choice: Choice


def request_of(name: str, checkpoints: int, label: Any, seed: Any, values: Sequence[Any]) -> ImageRequest:
    """The request of the controls of one side.

    Args:
        name: of the side.
        checkpoints: number of those that there are.
        label, seed, values: what the browser sent, as it came.

    Raises:
        UserError: naming what is wrong.
    """
    controls = Controls(*values)
    conform(f"{name}: what sets the budget", controls.meet, Meet)
    conform(f"{name}: own ρ of the guiding branch", controls.own_guiding_drop, bool)
    checkpoint = conform(f"{name}: checkpoint", controls.checkpoint, Annotated[int, Bounds(0, checkpoints - 1)])
    meant = {"class": label, "seed": seed, f"{name}: guidance scale": controls.scale, f"{name}: steps": controls.steps}
    meant |= {f"{name}: threshold of feature caching": controls.cache}
    if controls.meet in ("drop", "schedule"):
        meant[f"{name}: drop fraction ρ"] = controls.drop
    if controls.meet == "schedule":
        meant[f"{name}: ρ at the image"] = controls.drop_last
    elif controls.meet != "drop":
        meant[f"{name}: {next(words for words, what in _MEET if what == controls.meet)}"] = getattr(
            controls, controls.meet
        )
    if controls.own_guiding_drop:
        meant[f"{name}: ρ of the guiding branch"] = controls.guiding_drop
    empty = [words for words, value in meant.items() if value is None]
    if empty:
        raise UserError(f"{', '.join(empty)}: there is nothing, give a value")
    choice = Choice(
        label=label,
        seed=_whole(seed),
        sampler=controls.sampler,
        steps=_whole(controls.steps),
        scale=controls.scale,
        meet=controls.meet,
        drop=controls.drop if controls.meet in ("drop", "schedule") else 0.0,
        drop_last=controls.drop_last if controls.meet == "schedule" else 0.0,
        fraction=controls.fraction if controls.meet == "fraction" else 1.0,
        tflops=controls.tflops if controls.meet == "tflops" else 1.0,
        by=controls.by if controls.meet in ("fraction", "tflops") else "both",
        guiding_drop=controls.guiding_drop if controls.own_guiding_drop and controls.scale != 1 else None,
        cache=controls.cache,
    )
    return ImageRequest(checkpoint, choice)


def _named(on_progress: OnProgress, name: str, done: int, steps: int, what: str) -> None:
    """Tell of a step of A or B."""
    on_progress(done, steps, f"{name}: {what}")


def _next_seed(seed: Any) -> int:
    """Another seed than that in the field, whatever stands there."""
    return (int(seed) + 1) % 2**31 if isinstance(seed, int | float) and abs(seed) < 2**63 else 0


def _whole(value: Any) -> Any:
    """A whole number that came as a fraction; anything else as it is, to be refused in words."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _slider(low: float, high: float, value: float, step: float, label: str, **options: Any) -> Any:
    return gr.Slider(low, high, value, step=step, label=label, **options)


class Page:
    """The page, and what happens on it.

    Args:
        session: the checkpoints, which sample.
        title: of the page.
    """

    def __init__(self, session: Session, title: str) -> None:
        self.session, self.title = session, visible(title)
        self._jobs: dict[str, Event] = {}  # of each browser, and whether it is to stop

    # ---- what happens ------------------------------------------------------------------------------------------

    @contextmanager
    def _job(self, request: gr.Request) -> Iterator[OnProgress]:
        """A job of a browser: tells its page how far it is, and ends where that asks for it."""
        browser, stopped, progress = str(request.session_hash), Event(), gr.Progress()
        self._jobs[browser] = stopped

        def tell(done: int, steps: int, what: str) -> None:
            if stopped.is_set():
                raise StoppedError
            progress((done, steps), desc=what, unit="steps")

        try:
            yield tell
        finally:
            self._jobs.pop(browser, None)

    def stop(self, request: gr.Request) -> None:
        """End the job of this browser, which asks for that or has gone, at its next step."""
        job = self._jobs.get(str(request.session_hash))
        if job is not None:
            job.set()

    def update(
        self,
        request: gr.Request,
        known: tuple[tuple[ImageRequest, GeneratedImage], ...],
        label: Any,
        seed: Any,
        *values: Any,
    ) -> list[Any]:
        """Sample each side that requests another image than it shows."""
        half, shown_images = len(values) // 2, dict(known)
        pairs: list[tuple[ImageRequest, GeneratedImage]] = []
        try:
            with self._job(request) as on_progress:
                for name, side_values in zip(view.NAMES, (values[:half], values[half:]), strict=True):
                    wanted = request_of(name, len(self.session.places), label, seed, side_values)
                    generated = shown_images.get(wanted) or self.session.generate(
                        wanted.checkpoint, wanted.choice, partial(_named, on_progress, name)
                    )
                    pairs.append((wanted, generated))
        except StoppedError:
            return [gr.skip()] * (_OUTPUTS - 1) + [view.message("Stopped. The page shows what was there before.")]
        except UserError as error:
            return [gr.skip()] * (_OUTPUTS - 1) + [view.message(str(error))]
        requests, images = zip(*pairs, strict=True)
        classes = [self.session.classes(wanted.checkpoint)[wanted.choice.label] for wanted in requests]
        return [
            tuple(pairs),
            *map(view.image, view.NAMES, images, classes),
            view.difference_of(*images),
            view.numbers(images),
            view.downloads(images),
            "\n".join(
                self.session.command(wanted.checkpoint, wanted.choice, f"explored/{name}")
                for name, wanted in zip(view.NAMES, requests, strict=True)
            ),
            view.message("Done.", problem=False),
        ]

    def course(self, known: tuple[tuple[ImageRequest, GeneratedImage], ...], place: float) -> list[str]:
        """How both images came about: one evaluation of each, and the curves."""
        return [*self.moments(known, place), view.curves([generated for _, generated in known]) if known else ""]

    def moments(self, known: tuple[tuple[ImageRequest, GeneratedImage], ...], place: float) -> list[str]:
        """One evaluation of each side, at a place between 0, noise, and 100, the image."""
        try:
            place = conform("time", place, Annotated[float, Bounds(0, 100)])
        except UserError as error:
            return [view.message(str(error)), ""]
        images = [generated for _, generated in known]
        pictures = [
            view.moment(name, generated, place / 100) for name, generated in zip(view.NAMES, images, strict=False)
        ]
        return pictures or ["", ""]

    def strip(self, request: gr.Request, label: Any, seed: Any, *values: Any) -> str:
        """The same seed at seven budgets, by the other settings of A."""
        try:
            wanted = request_of("A", len(self.session.places), label, seed, values)
            with self._job(request) as on_progress:
                return view.strip(self.session.strip(wanted.checkpoint, wanted.choice, on_progress))
        except StoppedError:
            return view.message("Stopped.")
        except UserError as error:
            return view.message(str(error))

    def animate(self, known: tuple[tuple[ImageRequest, GeneratedImage], ...], form: str) -> list[str]:
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

    # ---- what there is -----------------------------------------------------------------------------------------

    def _controls(self, name: str, drop: float, base: dict[str, Any]) -> Controls:
        """The controls of one side."""
        session = self.session
        several = len(session.places) > 1
        number = view.NAMES.index(name) if several else 0
        drop = drop if session.routes(number) else 0.0
        sampler_keys, most = base["sampler"], session.most_steps
        with gr.Group():
            choices = [(visible(place.run), index) for index, place in enumerate(session.places)]
            checkpoint = gr.Radio(choices, value=number, label=f"{name}: checkpoint", visible=several)
            first = _slider(0, 0.95, drop, 0.05, f"{name}: drop fraction ρ", elem_id=f"drop_{name}")
        with gr.Accordion(f"{name}: more", open=False):
            meet = gr.Radio(_MEET, value="drop", label="what sets the budget", elem_id=f"meet_{name}")
            last = _slider(0, 0.95, 0.0, 0.05, "ρ at the image", visible=False)
            fraction = _slider(0.05, 1, 0.7, 0.05, "fraction of the full cost", visible=False)
            usual, words = session.usual_tflops(number), "TFLOPs per image (0.001 is a GFLOP)"
            tflops = gr.Number(usual, label=words, visible=False, elem_id=f"tflops_{name}")
            by = gr.Radio(_BY, value="both", label="what meets that budget", visible=False)
            scale = _slider(1, 10, base["guidance"]["scale"], 0.25, "guidance scale, 1 for none")
            own_guiding_drop = gr.Checkbox(
                False, label="with guidance: the branch without class has a ρ of its own (Lite-CFG)"
            )
            guiding_drop = _slider(0, 0.95, 0.9, 0.05, "its ρ", visible=False)
            cache = _slider(0, 2, sampler_keys["cache"], 0.05, "feature caching: threshold, 0 for none")
            samplers = sorted({name for index in range(len(session.places)) for name in session.samplers(index)})
            sampler = gr.Dropdown(samplers, value=session.sampler(number), label="sampler")
            steps = _slider(2, most, min(most, sampler_keys["steps"]), 1, "steps", elem_id=f"steps_{name}")

        def update_controls(what: Any) -> list[Any]:
            words = f"{name}: ρ in noise" if what == "schedule" else f"{name}: drop fraction ρ"
            asks = what in ("fraction", "tflops")
            return [
                gr.update(visible=not asks, label=words),
                *(gr.update(visible=what == each) for each in ("schedule", "fraction", "tflops")),
                gr.update(visible=asks),
            ]

        meet.input(update_controls, meet, [first, last, fraction, tflops, by], **_SILENT)
        own_guiding_drop.input(lambda own: gr.update(visible=own is True), own_guiding_drop, guiding_drop, **_SILENT)
        return Controls(
            checkpoint,
            meet,
            first,
            last,
            fraction,
            tflops,
            by,
            own_guiding_drop,
            guiding_drop,
            cache,
            sampler,
            steps,
            scale,
        )

    def blocks(self, base: dict[str, Any]) -> gr.Blocks:
        """The page.

        Args:
            base: the plain values of the configuration, which the controls begin with.
        """
        session = self.session
        names = [(visible(name), number) for number, name in enumerate(session.classes(0))]
        routes = any(session.routes(number) for number in range(len(session.places)))
        with gr.Blocks(title=self.title, analytics_enabled=False, fill_width=True) as page:
            gr.HTML(view.heading(self.title))
            gr.Markdown(_ABOUT)
            known = gr.State((), time_to_live=3600)
            with gr.Row(elem_id="images"):
                images = [gr.HTML(elem_id=f"image_{name}", min_height=120) for name in view.NAMES]
                between = gr.HTML(elem_id="difference")
            with gr.Row():
                with gr.Column(scale=2, min_width=280):
                    with gr.Group():
                        label = gr.Dropdown(names, value=0, label="class", elem_id="label")
                        seed = gr.Number(base["seed"], label="seed", precision=0, elem_id="seed")
                        another = gr.Button("another seed", size="sm", elem_id="another")
                    sides = [
                        self._controls(name, drop, base) for name, drop in zip(view.NAMES, (0.0, 0.5), strict=True)
                    ]
                    status = gr.HTML(elem_id="status", min_height=70)
                    stop = gr.Button("stop", size="sm", elem_id="stop")
                with gr.Column(scale=5, min_width=280):
                    numbers = gr.HTML(elem_id="numbers")
                    place = gr.Slider(0, 100, 60, step=1, label="time: 0 is noise, 100 the image", elem_id="place")
                    moments = [gr.HTML(elem_id=f"moment_{name}") for name in view.NAMES]
                    curves = gr.HTML(elem_id="curves")
                    with gr.Row():
                        seven = gr.Button("same seed at seven budgets", elem_id="seven", visible=routes)
                        form = gr.Radio(_FORMS, value=_FORMS[0], label="animation as")
                        move = gr.Button("animate A and B", elem_id="animate")
                    strip = gr.HTML(elem_id="strip")
                    with gr.Row():
                        animations = [gr.HTML(elem_id=f"animation_{name}") for name in view.NAMES]
                    downloads = gr.HTML(elem_id="downloads")
                    commands = gr.Textbox(
                        label="the same images from a terminal, A then B", lines=2, elem_id="commands"
                    )
            inputs = [known, label, seed, *sides[0].components, *sides[1].components]
            outputs = [known, *images, between, numbers, downloads, commands, status]
            assert len(outputs) == _OUTPUTS
            one = {"concurrency_id": "sampling", "concurrency_limit": 1, "trigger_mode": "always_last"}

            every = (label, seed, *sides[0].components, *sides[1].components)
            # A slider that a browser brings back within its bounds has changed, though nobody moved it.
            changed = [each.change if isinstance(each, gr.Slider) else each.input for each in every]
            shared: dict[str, Any] = {"show_progress_on": status, **_EVENT, **one}
            seeded = another.click(_next_seed, seed, seed, **_SILENT)
            for updated in (
                gr.on([page.load, *changed], self.update, inputs, outputs, **shared),
                seeded.then(self.update, inputs, outputs, **shared),
            ):
                updated.then(self.course, [known, place], [*moments, curves], **_SILENT)
            place.input(self.moments, [known, place], moments, trigger_mode="always_last", **_SILENT)
            seven.click(self.strip, [label, seed, *sides[0].components], strip, **{**shared, "show_progress_on": strip})
            move.click(self.animate, [known, form], animations, concurrency_limit=1, **_EVENT)
            stop.click(self.stop, queue=False, **_SILENT)
            page.unload(self.stop)
        return page.queue(max_size=_WAITING, default_concurrency_limit=4, api_open=False)


_OUTPUTS = 8
_EVENT: dict[str, Any] = {"api_visibility": "private", "preprocess": False}
"""Values come as they were typed: what is wrong with them we say ourselves, by name."""
_SILENT: dict[str, Any] = {"show_progress": "hidden", **_EVENT}


@contextmanager
def serving(page: gr.Blocks, host: str, port: int | None, share: bool) -> Iterator[str]:
    """Answer browsers within the block; yields the page's address.

    Gradio's own ``launch`` would answer everything that Gradio can, see :class:`dcdit.explorer.gate.Gate`.

    Args:
        page: what they see.
        host, port: where; None takes the first free port from 7860.
        share: through a public address of Gradio's as well.

    Raises:
        UserError: if nothing can listen there, or there is no public address.
    """
    page.state_session_capacity = _SESSIONS
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        page,
        "/",
        theme=gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
        css=view.CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size="1b",
    )
    answered = gate(app, host, page.fns)
    listening = _listen(host, port)
    server = uvicorn.Server(
        uvicorn.Config(
            answered,
            http="h11",  # the one that limits headers
            ws="none",
            log_config=None,
            log_level="critical",
            access_log=False,
            limit_concurrency=8 * _SESSIONS,
            timeout_graceful_shutdown=1,
        )
    )
    thread = Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    while thread.is_alive() and not server.started:
        time.sleep(0.01)
    try:
        number = listening.getsockname()[1]
        if share:
            yield _public_address(page, host, number, answered)
        else:
            name = "localhost" if answered.any_address else host
            yield f"http://{f'[{name}]' if ':' in name else name}:{number}"
    finally:
        server.should_exit = True
        thread.join(timeout=5)


def _listen(host: str, port: int | None) -> socket.socket:
    """A socket that listens at the port, or at the first free one."""
    ports = range(7860, 7960) if port is None else [port]
    for number in ports:
        try:
            return socket.create_server((host, number), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise UserError(f"host={host} port={number}: nothing can listen there, {error.strerror}") from None
    raise UserError(
        f"port={port or '7860 to 7959'}: it is taken, choose another" + " or leave the key out" * bool(port)
    )


def _public_address(page: gr.Blocks, host: str, port: int, answered: Gate) -> str:
    """An address of Gradio's that leads here, and that is answered to."""
    try:
        address = setup_tunnel(host, port, page.share_token, None, None)
    except Exception as error:
        raise UserError(f"share=true: Gradio has no public address for it ({error}), leave the key out") from error
    place = urlsplit(address)
    answered.hosts.add(str(place.hostname))
    return f"https://{place.netloc}"
