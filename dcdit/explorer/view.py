"""What the explorer shows of generated images, as fragments of HTML: pictures within, nothing that is fetched."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from PIL import Image

from dcdit.checks import visible
from dcdit.compute.table import format_flops
from dcdit.errors import UserError
from dcdit.explorer.session import GeneratedImage, difference
from dcdit.network.embeddings import PURE_NOISE
from dcdit.sampling.overlays import Pixels, enlarged, side_by_side

NAMES = ("A", "B")
_COLOURS = ("#0072B2", "#D55E00")
"""Of A and B: told apart by everyone, and seen on light and dark."""
_INK = "#010203"
"""A colour that nobody takes; in the page it becomes that of the text."""

_NOTE = (
    "Tokens kept: the mean of all evaluations and both branches of guidance; reused ones keep none. This is one image"
    " at a time: a small network then takes about as long whatever is dropped, for it takes longer to begin each"
    " operation than to do it."
)
_environment = Environment(
    loader=PackageLoader("dcdit", "explorer"),
    autoescape=True,
    finalize=lambda value: visible(value) if type(value) is str else value,  # class names may be anything
)
_fragments: Any = _environment.get_template("fragments.html").module

CSS = """
figure.dcdit { margin: 0; } figure.dcdit img { width: 100%; image-rendering: pixelated; border-radius: 4px; }
figure.dcdit svg { width: 100%; height: auto; }
div.dcdit-row { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .5rem; }
div.dcdit-plots { grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
figure.dcdit figcaption, p.dcdit { font-size: .85rem; overflow-wrap: anywhere; }
p.dcdit a, figure.dcdit a { text-decoration: underline; margin-right: 1rem; }
#images { max-width: 60rem; gap: .5rem; flex-wrap: nowrap; }
#images > * { min-width: 0 !important; }
@media (max-width: 700px) { #images { position: sticky; top: 0; z-index: 9; background: var(--body-background-fill); } }
p.problem { border-left: 4px solid #D55E00; padding: .4rem .8rem; font-weight: 600; }
.dcdit-wide { overflow-x: auto; } table.dcdit { font-variant-numeric: tabular-nums; width: 100%; }
table.dcdit th, table.dcdit td { text-align: left; padding: .15rem .8rem .15rem 0; vertical-align: top; }
table.dcdit th[scope=row] { font-weight: 400; }
@media (max-width: 700px) { table.dcdit { table-layout: fixed; font-size: .8rem; }
  table.dcdit th, table.dcdit td { padding: .15rem .3rem; overflow-wrap: anywhere; } }
"""


def _source(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png(pixels: Pixels) -> str:
    """A picture (height, width, 3) as the source of an ``<img>``."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return _source(file.getvalue(), "image/png")


def image(name: str, generated: GeneratedImage, class_name: str) -> str:
    """The finished image of one side."""
    alt = f"{name}: class {class_name}, seed {generated.choice.seed}, {generated.title}"
    return str(_fragments.picture(png(enlarged(generated.image, 256)), f"{name}: {short(generated)}", alt))


def short(generated: GeneratedImage) -> str:
    """Budget and cost of an image, such as ``ρ 0.5, 3.4 GFLOPs``."""
    drops = sorted({round(drop, 2) for drop in generated.drops})
    parts = [f"ρ {' to '.join(f'{drop:g}' for drop in (drops[0], drops[-1])[: len(drops)])}"]
    cache = generated.sampling.sampler.settings.cache
    parts += [f"cache {cache:.3g}"] if cache else []
    return ", ".join([*parts, format_flops(generated.flops)])


def difference_of(one: GeneratedImage, two: GeneratedImage) -> str:
    """Where two images differ, brightened until the greatest difference is white."""
    try:
        pixels = difference(one.image, two.image)
    except UserError as error:
        return message(str(error))
    brighter = 255 / max(1, int(pixels.max()))
    shown = (pixels * brighter).round().astype(np.uint8)
    caption = f"|A − B|, {brighter:.3g} times brighter: {pixels.mean() / 255:.2%} of the range on average"
    if not pixels.any():
        caption = "|A − B|: 0.00%, both are the same"
    return str(_fragments.picture(png(enlarged(shown, 256)), caption, f"difference of A and B, {caption}"))


def moment(name: str, generated: GeneratedImage, time: float) -> str:
    """The evaluation of the network that is nearest to a ``time`` between 0, noise, and 1, the image."""
    times = _times(generated)
    index = min(range(len(times)), key=lambda number: abs(times[number] - 100 * time))
    boundaries = generated.moments[index].boundaries
    cost = format_flops(generated.step_flops[index])
    caption = f"{name}: evaluation {index + 1} of {len(generated.moments)}, {cost}"
    if boundaries is not None:
        caption += f", {boundaries.caption}"
        if boundaries.mask.any():
            caption += "; orange: kept, blue: dropped by the tail drop, grey: left to encoder and decoder"
        else:
            caption += " from an evaluation before: no token ran, and none was dropped"
    return _row(generated.at(index), caption)


def _times(generated: GeneratedImage) -> list[float]:
    """The times of all evaluations, from 0, noise, to 100, the image."""
    return [100 * (1 - moment.timestep / PURE_NOISE) for moment in generated.moments]


def _row(pictures: Sequence[tuple[str, Pixels]], caption: str) -> str:
    """Pictures beside each other, each with its own caption before it in ``pictures``."""
    return str(_fragments.pictures([(png(picture), own) for own, picture in pictures], caption))


def _share(value: float, full: float) -> str:
    return f"{value / full:.0%} of the full budget's"


def numbers(generated_images: Sequence[GeneratedImage]) -> str:
    """A table of what the images cost and lost, beside the same images at the full budget."""
    rows: dict[str, list[str]] = {}

    def add(heading: str, cell: str) -> None:
        rows.setdefault(heading, []).append(cell)

    for generated in generated_images:
        full = generated.full or generated
        reused = generated.tokens.count(0)
        add("settings", generated.title)
        add("work", f"{format_flops(generated.flops)}, {_share(generated.flops, full.flops)}")
        times = f"{generated.milliseconds:.0f} ms (median of {len(generated.times)}), "
        add("time here", times + _share(generated.milliseconds, full.milliseconds))
        add("tokens kept", f"{generated.kept:.1%} of all positions" if generated.tokens else "all patches")
        add("evaluations reused", f"{reused} of {len(generated.moments)}")
        add("differs from the full budget", f"{generated.lost:.2%} of the range on average")
    return str(_fragments.numbers(NAMES, rows.items(), _NOTE))


def curves(generated_images: Sequence[GeneratedImage]) -> str:
    """Tokens kept, drop fraction and FLOPs over the time, as SVG in the page's own colours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawn = []
    style: Any = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK)
    for title in ("tokens kept and ρ, %", "GFLOPs of an evaluation"):
        with plt.rc_context({**style, "svg.fonttype": "none"}):
            figure, axes = plt.subplots(figsize=(4.6, 2.5), layout="constrained")
            for name, generated, colour, line in zip(NAMES, generated_images, _COLOURS, ("-", "--"), strict=False):
                times = _times(generated)
                if title.startswith("GFLOPs"):
                    axes.plot(times, np.divide(generated.step_flops, 1e9), line, c=colour, marker=".", label=name)
                elif generated.tokens:
                    axes.plot(times, np.multiply(generated.tokens, 100), line, c=colour, marker=".", label=name)
                    axes.plot(times, np.multiply(generated.drops, 100), ":", c=colour, lw=1, label=f"ρ of {name}, %")
            axes.set(xlabel="time: 0 is noise, 100 the image", ylabel=title, xlim=(0, 100), ylim=(0, None))
            axes.spines[["top", "right"]].set_visible(False)
            axes.patch.set_alpha(0)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
            file = io.StringIO()
            figure.savefig(file, format="svg", transparent=True)
            plt.close(figure)
        text = file.getvalue()
        tag = text[text.index("<svg") :].replace(_INK, "currentColor")
        drawn.append(tag.replace("<svg", f'<svg role="img" aria-label="{title} over the time"', 1))
    figures = "".join(f"<figure class=dcdit>{svg}</figure>" for svg in drawn)
    return f'<div class="dcdit-row dcdit-plots">{figures}</div>'


def downloads(generated_images: Sequence[GeneratedImage]) -> str:
    """Links that save the finished images as PNG, pixel by pixel."""
    links = [
        (png(enlarged(generated.image, 1)), _file(generated, f"{name}.png"), f"{name} as PNG")
        for name, generated in zip(NAMES, generated_images, strict=False)
    ]
    return str(_fragments.downloads(links))


def animated(name: str, generated: GeneratedImage, file: Path) -> str:
    """An animation that was saved as ``file``, and a link that saves it."""
    source = _source(file.read_bytes(), f"image/{file.suffix[1:]}")
    link = f"save {name} as {file.suffix[1:].upper()}"
    file_name = _file(generated, f"{name}{file.suffix}")
    return str(_fragments.saved(source, file_name, link, f"{name}: from noise to image"))


def strip(pictures: Sequence[tuple[str, Pixels]]) -> str:
    """The same seed at several budgets, and a link that saves all in one picture."""
    link = (png(side_by_side(pictures)), "seven_budgets.png", "all in one PNG")
    return _row(pictures, "The same seed by A's settings") + str(_fragments.downloads([link]))


def heading(title: str) -> str:
    """The first line of the page."""
    return str(_fragments.heading(title))


def message(text: str, problem: bool = True) -> str:
    """A message about what went wrong or is going on."""
    return str(_fragments.message("problem" if problem else "", text))


def _file(generated: GeneratedImage, ending: str) -> str:
    return f"class_{generated.choice.label}_seed_{generated.choice.seed}_{ending}"
