"""The page of ``dcdit.report``: sections of curves, tables and pictures, in one file that needs no other."""

import base64
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from matplotlib import pyplot as plt
from matplotlib.figure import Figure as PlotFigure

from dcdit.checks import visible
from dcdit.evaluation.courses import LARGEST, Course, lines
from dcdit.evaluation.curves import Section, arrange, best_words, pareto
from dcdit.evaluation.plots import course_plot, keep_ratio, over_scale, trade_off
from dcdit.evaluation.results import Result
from dcdit.evaluation.words import differences_from_published
from dcdit.runtime.files import make_writable_folder, replacing, write_csv, write_json, write_text

_PLOT = re.compile(r"(\d+_)?(guidance|tflops|milliseconds|keep_ratio)\.png|training_\w+\.png")


def _on_a_page(value: Any) -> Any:
    """A value as a page shows it: bytes of names that are no text become escapes."""
    return visible(value) if type(value) is str else value


def _source(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def plots(section: Section) -> Iterable[tuple[str, str, PlotFigure | None]]:
    """Name, title and picture of each plot of a section."""
    figure, results = section.figures[0], section.results
    places = {f"{each.values['device']}, batches of {each.values['timing']['batch_size']}" for each in results}
    if section.scales:
        title = f"{figure.heading} over the guidance scale at each budget; the best of each is marked"
        yield "guidance", title, over_scale(section, figure)
    if len(results) > 1 and sum(len(series.points) for series in section.series) > 1:  # one point is no trade-off
        front = " Dashed: the Pareto front" if len(results) > 2 else ""
        title = f"{figure.heading} against TFLOPs per image, all steps.{front}"
        yield "tflops", title, trade_off(section, figure, "tflops_per_image", "TFLOPs per image")
        where = "; ".join(sorted(places))
        title = f"{figure.heading} against the time of sampling an image, decoding apart ({where})"
        title += ". Times of different commands do not compare well"
        yield "milliseconds", title, trade_off(section, figure, "milliseconds_per_image", "ms per image")
    title = "Keep ratio of the main branch on the way from noise to image, least (solid) and greatest (dotted) drop"
    yield "keep_ratio", title, keep_ratio(section)


def figures(section: Section, prefix: str, out: Path) -> Iterable[dict[str, str]]:
    """Draw and save the plots of a section; yields them for the page."""
    for name, title, figure in plots(section):
        if figure is not None:
            yield {"title": title, "source": saved(figure, out / f"{prefix}{name}.png")}


def saved(figure: PlotFigure, path: Path) -> str:
    """Save a plot; what a page shows of it."""
    image = io.BytesIO()
    figure.savefig(image, dpi=130, format="png")
    plt.close(figure)
    with replacing(path) as file:
        file.write(image.getvalue())
    return _source(image.getvalue())


def training(courses: Sequence[Course], out: Path) -> dict[str, Any]:
    """How the runs went: a table, curves, and the pictures of their validations."""
    found = []
    for title, curves in lines(courses).items():
        targets = sorted({each.target for each in courses if each.target}) if title == "keep ratio" else []
        name = f"training_{title.split()[0].lower() if title != 'diffusion loss' else 'loss'}.png"
        source = saved(course_plot(curves, title, targets), out / name)
        found.append({"title": f"{title} over the steps of training".capitalize(), "source": source})
    return {
        "rows": [{"name": each.name, "cells": each.cells} for each in courses],
        "left_out": max(0, len(courses) - LARGEST),
        "figures": found,
        "runs": [
            {
                "name": each.name,
                "pictures": [{"at": path.stem, "source": _source(path.read_bytes())} for path in each.pictures],
            }
            for each in courses[:LARGEST]
            if each.pictures
        ],
    }


def _range(values: Sequence[float]) -> str:
    mean = f"{sum(values) / len(values):.4g}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3g} to {max(values):.3g})"


def rows(section: Section) -> Iterable[dict[str, Any]]:
    """The table of a section."""
    front = {id(result) for result in pareto(section.results, section.figures[0])}
    for series in section.series:
        for number, point in enumerate(series.points):
            cells = [f"{point.at:g}", str(len(point.results))]
            cells += [_range(point.figures("metrics", figure.key)) for figure in section.figures]
            routed = "keep_ratio" in point.results[0].values
            cells.append(_percent(point.figures("keep_ratio", "mean")) if routed else "-")
            cells.append(f"{sum(point.figures('tflops_per_image')) / len(point.results):.4g}")
            cells.append(f"{sum(point.figures('milliseconds_per_image')) / len(point.results):.4g}")
            name = f"{series.name} ({series.network}, {series.first.values['parameters'] / 1e6:.3g}M)"
            best = len(section.results) > 2 and any(id(result) in front for result in point.results)
            yield {"name": name if number == 0 else "", "first": number == 0, "front": best, "cells": cells}


def _percent(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.1%}"


def grids(section: Section) -> Iterable[dict[str, Any]]:
    """For each curve the previews of its first run."""
    for series in section.series:
        previews = [
            {"at": f"{section.axis.symbol} {point.at:g}", "source": _source(point.results[0].preview.read_bytes())}
            for point in series.points
            if point.results[0].preview is not None
        ]
        if previews:
            yield {"name": series.name, "previews": previews}


def save_measurements(results: Sequence[Result], out: Path) -> None:
    """The measurements as CSV, one flat row each, and as JSON with everything that is known of them."""
    flat = [result.row() for result in results]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    write_csv(out / "measurements.csv", columns, flat)
    write_json(out / "measurements.json", [result.values for result in results])


def write_report(
    results: Sequence[Result], courses: Sequence[Course], out: Path, title: str, left_out: Sequence[str] = ()
) -> Path:
    """Write page, plots and measurements into ``out``, which is made if needed; returns the page.

    Args:
        results: what was measured.
        courses: how runs went, measured or not.
        out: the folder.
        title: of the page.
        left_out: what is wrong with files that are not in it.
    """
    make_writable_folder(out, f"out={out}")
    for plot in out.glob("*.png"):  # of an earlier report, which may have had other sections
        if _PLOT.fullmatch(plot.name):
            plot.unlink()
    save_measurements(results, out)
    shown = []
    arranged = arrange(results)
    for number, section in enumerate(arranged, 1):
        prefix = f"{number}_" if len(arranged) > 1 else ""
        labels = [figure.heading for figure in section.figures]
        shown.append(
            {
                "words": section.described(),
                "differences": differences_from_published(section.results[0].values),
                "best": best_words(section.results),
                "headings": [section.axis.symbol, "seeds", *labels, "keep ratio", "TFLOPs/image", "ms/image"],
                "rows": list(rows(section)),
                "figures": list(figures(section, prefix, out)),
                "grids": list(grids(section)),
            }
        )
    pages = Environment(loader=PackageLoader("dcdit", "evaluation"), autoescape=True, finalize=_on_a_page)
    template = pages.get_template("report.html")
    runs = len({result.values["run"] for result in results})
    page = out / "report.html"
    went = training(courses, out) if courses else None
    text = template.render(title=title, sections=shown, training=went, count=len(results), runs=runs, left_out=left_out)
    write_text(page, text)
    return page
