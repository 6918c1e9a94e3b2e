"""The page of ``dcdit.report``: sections of curves, tables and pictures, in one file that needs no other."""

import base64
import io
import re
from collections.abc import Iterable, Sequence
from operator import attrgetter
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, PackageLoader
from matplotlib import pyplot as plt
from matplotlib.figure import Figure as PlotFigure

from dcdit.checks import visible
from dcdit.evaluation.descriptions import (
    describe_comparability,
    describe_reference,
    describe_sampling,
    describe_weights,
    differences_from_published,
)
from dcdit.evaluation.results import Result
from dcdit.evaluation.scores import Score
from dcdit.evaluation.settings import figures_of_metrics
from dcdit.reporting.collect import is_png, row_of
from dcdit.reporting.curves import Section, arrange, describe_best, pareto
from dcdit.reporting.histories import MOST_RUNS, RunHistory, curves_of
from dcdit.reporting.plots import history_plot, keep_ratio, over_scale, trade_off
from dcdit.runtime.files import make_writable_folder, replacing, write_csv, write_json, write_text

_tflops, _milliseconds = attrgetter("tflops_per_image"), attrgetter("milliseconds_per_image")
_PLOT = re.compile(r"(\d+_)?(guidance|tflops|milliseconds|keep_ratio)\.png|training_\w+\.png")


def _on_a_page(value: Any) -> Any:
    """Return a value as a page shows it: bytes of names that are no text become escapes."""
    return visible(value) if type(value) is str else value


def _source(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def plots(section: Section) -> Iterable[tuple[str, str, PlotFigure | None]]:
    """Yield name, title and picture of each plot of a section."""
    figure, results = section.figures[0], section.results
    machines = {f"{result.device}, batches of {result.timing.batch_size}" for result in results}
    if section.scales:
        title = f"{figure.heading} over the guidance scale at each budget; the best of each is marked"
        yield "guidance", title, over_scale(section, figure)
    if len(results) > 1 and sum(len(series.points) for series in section.series) > 1:  # one point is no trade-off
        front = len(results) > 2
        title = f"{figure.heading} against TFLOPs per image, all steps.{' Dashed: the Pareto front' if front else ''}"
        yield "tflops", title, trade_off(section, figure, _tflops, "TFLOPs per image", front)
        where = "; ".join(sorted(machines))
        title = f"{figure.heading} against the time of sampling an image, decoding apart ({where})"
        title += ". Times of different commands do not compare well"
        yield "milliseconds", title, trade_off(section, figure, _milliseconds, "ms per image")
    title = "Keep ratio of the main branch on the way from noise to image, least (solid) and greatest (dotted) drop"
    yield "keep_ratio", title, keep_ratio(section)


def figures(section: Section, prefix: str, out: Path) -> Iterable[dict[str, str]]:
    """Draw and save the plots of a section; yield them for the page."""
    for name, title, figure in plots(section):
        if figure is not None:
            yield {"title": title, "source": saved(figure, out / f"{prefix}{name}.png")}


def saved(figure: PlotFigure, path: Path) -> str:
    """Save a plot; return it as the page embeds it."""
    image = io.BytesIO()
    figure.savefig(image, dpi=130, format="png")
    plt.close(figure)
    with replacing(path) as file:
        file.write(image.getvalue())
    return _source(image.getvalue())


def training(histories: Sequence[RunHistory], out: Path) -> dict[str, Any]:
    """Return how the runs went, for the page: a table, curves, and the pictures of their validations."""
    plotted = []
    for title, curves in curves_of(histories).items():
        targets = sorted({run.target for run in histories if run.target}) if title == "keep ratio" else []
        name = f"training_{title.split()[0].lower() if title != 'diffusion loss' else 'loss'}.png"
        source = saved(history_plot(curves, title, targets), out / name)
        plotted.append({"title": f"{title} over the steps of training".capitalize(), "source": source})
    return {
        "rows": [{"name": run.name, "cells": run.cells} for run in histories],
        "left_out": max(0, len(histories) - MOST_RUNS),
        "figures": plotted,
        "runs": [
            {
                "name": run.name,
                "pictures": [{"at": path.stem, "source": _source(path.read_bytes())} for path in run.pictures],
            }
            for run in histories[:MOST_RUNS]
            if run.pictures
        ],
    }


def _range(values: Sequence[float]) -> str:
    mean = f"{fmean(values):.4g}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3g} to {max(values):.3g})"


def rows(section: Section) -> Iterable[dict[str, Any]]:
    """Yield the rows of a section's table."""
    front = {id(result) for result in pareto(section.results, section.figures[0])}
    for series in section.series:
        for number, point in enumerate(series.points):
            cells = [f"{point.at:g}", str(len(point.results))]
            cells += [_range(point.figures(figure)) for figure in section.figures]
            ratios = [result.keep_ratio.mean for result in point.results if result.keep_ratio]
            cells.append(f"{fmean(ratios):.1%}" if ratios else "-")
            cells += [f"{fmean(point.values(cost)):.4g}" for cost in (_tflops, _milliseconds)]
            weights = describe_weights(series.first.plan, series.first.ema_decay)
            name = f"{series.name} ({series.network}, {series.first.parameters / 1e6:.3g}M, {weights})"
            best = len(section.results) > 2 and any(id(result) in front for result in point.results)
            yield {"name": name if number == 0 else "", "first": number == 0, "front": best, "cells": cells}


def grids(section: Section) -> Iterable[dict[str, Any]]:
    """Yield for each curve the previews of its first run, where they are there."""
    for series in section.series:
        pictures = [(point.at, point.results[0].path.with_suffix(".png")) for point in series.points]
        previews = [
            {"at": f"{section.axis.symbol} {at:g}", "source": _source(path.read_bytes())}
            for at, path in pictures
            if is_png(path)
        ]
        if previews:
            yield {"name": series.name, "previews": previews}


def section_of(section: Section, prefix: str, out: Path) -> dict[str, Any]:
    """Return a section for the page; its plots are saved in ``out``, their names begin with ``prefix``."""
    labels = [figure.heading for figure in section.figures]
    return {
        "setting": section.describe(),
        "differences": differences_from_published(section.results[0].plan),
        "best": describe_best(section.results),
        "headings": [section.axis.symbol, "seeds", *labels, "keep ratio", "TFLOPs/image", "ms/image"],
        "rows": list(rows(section)),
        "figures": list(figures(section, prefix, out)),
        "grids": list(grids(section)),
    }


def scored(scores: Sequence[Score]) -> dict[str, Any] | None:
    """Return the scores of images that exist, for the page; None if there are none."""
    figures = {figure.key: figure.heading for score in scores for figure in figures_of_metrics(score.plan.metrics)}
    return (
        {
            "headings": ["number", *figures.values(), "features", "reference", "sampled"],
            "rows": [
                {
                    "name": score.source,
                    "note": describe_comparability(score.plan, score.sampled.plan if score.sampled else None),
                    "cells": [
                        f"{score.plan.count:,}",
                        *(f"{score.figure(key):.4g}" if key in score.metrics else "-" for key in figures),
                        score.plan.features.name,
                        describe_reference(score),
                        describe_sampling(score),
                    ],
                }
                for score in scores
            ],
        }
        if scores
        else None
    )


def save_measurements(results: Sequence[Result], out: Path) -> None:
    """Write the measurements as CSV, one flat row each, and as JSON with everything that is known of them."""
    flat = [row_of(result) for result in results]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    write_csv(out / "measurements.csv", columns, flat)
    write_json(out / "measurements.json", [result.as_plain() for result in results])


def write_report(
    results: Sequence[Result],
    histories: Sequence[RunHistory],
    out: Path,
    title: str,
    left_out: Sequence[str] = (),
    scores: Sequence[Score] = (),
) -> Path:
    """Write page, plots and measurements into ``out``, which is made if needed; return the page.

    Args:
        results: what was measured.
        histories: how runs went, measured or not.
        out: the folder.
        title: of the page.
        left_out: what is wrong with files that are not in it.
        scores: of images that exist.
    """
    make_writable_folder(out, f"out={out}")
    for plot in out.glob("*.png"):  # of an earlier report, which may have had other sections
        if _PLOT.fullmatch(plot.name):
            plot.unlink()
    save_measurements(results, out)
    sections = arrange(results)
    prefixes = [f"{number}_" for number in range(1, len(sections) + 1)] if len(sections) > 1 else [""]
    pages = Environment(loader=PackageLoader("dcdit", "reporting"), autoescape=True, finalize=_on_a_page)
    text = pages.get_template("report.html").render(
        title=title,
        sections=[section_of(section, prefix, out) for section, prefix in zip(sections, prefixes, strict=False)],
        training=training(histories, out) if histories else None,
        scored=scored(scores),
        count=len(results),
        runs=len({result.run for result in results}),
        left_out=left_out,
    )
    write_text(out / "report.html", text)
    return out / "report.html"
