"""The page of ``dcdit.report``: sections of curves, tables and pictures, in one file that needs no other."""

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from dcdit.evaluation.plots import keep_ratio, trade_off
from dcdit.evaluation.results import Result, Section, arrange
from dcdit.evaluation.settings import METRICS
from dcdit.runtime.files import replacing, writable_folder, write_csv, write_json, write_text


def _label(key: str) -> str:
    """What a metric is called on the page."""
    return next(metric.heading for metric in METRICS.values() if metric.key == key)


def _source(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def figures(section: Section, prefix: str, out: Path) -> Iterable[dict[str, str]]:
    """Draw and save the plots of a section; yields them for the page."""
    metric = section.metrics[0]
    label, results = _label(metric), [result for s in section.series for point in s.points for result in point.results]
    places = {f"{each.values['device']}, batches of {each.values['timing']['batch_size']}" for each in results}
    words = "; ".join(sorted(places))

    plots: dict[str, tuple[str, Figure | None]] = {
        "keep_ratio": (
            "Keep ratio on the way from noise to image, at the least (solid) and the greatest (dotted) drop",
            keep_ratio(section),
        ),
    }
    if sum(len(series.points) for series in section.series) > 1:  # a single point is no trade-off
        plots = {
            "tflops": (
                f"{label} against TFLOPs per image, all steps",
                trade_off(section, metric, "tflops_per_image", label, "TFLOPs per image"),
            ),
            "milliseconds": (
                f"{label} against the time of sampling an image, decoding apart ({words})",
                trade_off(section, metric, "milliseconds_per_image", label, "ms per image"),
            ),
            **plots,
        }
    for name, (title, figure) in plots.items():
        if figure is not None:
            image = io.BytesIO()
            figure.savefig(image, dpi=130, format="png")
            plt.close(figure)
            with replacing(out / f"{prefix}{name}.png") as file:
                file.write(image.getvalue())
            yield {"title": title, "source": _source(image.getvalue())}


def _range(values: Sequence[float]) -> str:
    mean = f"{sum(values) / len(values):.4g}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3g} to {max(values):.3g})"


def rows(section: Section) -> Iterable[dict[str, Any]]:
    """The table of a section."""
    for series in section.series:
        for number, point in enumerate(series.points):
            cells = [f"{point.drop:g}", str(len(point.results))]
            cells += [_range(point.figures("metrics", metric)) for metric in section.metrics]
            routed = "keep_ratio" in point.results[0].values
            cells.append(_percent(point.figures("keep_ratio", "mean")) if routed else "-")
            cells.append(f"{sum(point.figures('tflops_per_image')) / len(point.results):.4g}")
            cells.append(f"{sum(point.figures('milliseconds_per_image')) / len(point.results):.4g}")
            name = f"{series.name} ({series.network}, {series.first.values['parameters'] / 1e6:.3g}M)"
            yield {"name": name if number == 0 else "", "first": number == 0, "cells": cells}


def _percent(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.1%}"


def grids(section: Section) -> Iterable[dict[str, Any]]:
    """For each curve the previews of its first run."""
    for series in section.series:
        previews = [
            {"drop": f"{point.drop:g}", "source": _source(point.results[0].preview.read_bytes())}
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


def write_report(results: Sequence[Result], out: Path, title: str, left_out: Sequence[str] = ()) -> Path:
    """Write page, plots and measurements into ``out``, which is made if needed; returns the page.

    Args:
        results: what is reported.
        out: the folder.
        title: of the page.
        left_out: what is wrong with files that are not in it.
    """
    writable_folder(out, f"out={out}")
    save_measurements(results, out)
    shown = []
    arranged = arrange(results)
    for number, section in enumerate(arranged, 1):
        prefix = f"{number}_" if len(arranged) > 1 else ""
        labels = [_label(metric) for metric in section.metrics]
        shown.append(
            {
                "words": section.described(),
                "headings": ["ρ", "seeds", *labels, "keep ratio", "TFLOPs/image", "ms/image"],
                "rows": list(rows(section)),
                "figures": list(figures(section, prefix, out)),
                "grids": list(grids(section)),
            }
        )
    template = Environment(loader=PackageLoader("dcdit", "evaluation"), autoescape=True).get_template("report.html")
    runs = len({result.values["run"] for result in results})
    page = out / "report.html"
    text = template.render(title=title, sections=shown, count=len(results), runs=runs, left_out=left_out)
    write_text(page, text)
    return page
