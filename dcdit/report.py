"""One page of quality against compute: ``python -m dcdit.report runs/b_n4 runs/dit_b_2``.

Reads what ``dcdit.evaluate`` left in and below the given folders, and writes ``report.html``, which needs no other
file, the plots, and the points as CSV and JSON.
"""

import base64
import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from jinja2 import Environment, PackageLoader
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from dcdit.evaluation.metrics import HEADINGS, KEYS
from dcdit.evaluation.plots import kept_share, trade_off
from dcdit.evaluation.results import Result, Section, arrange, read_results
from dcdit.settings.entry import CONFIG_DIR, entry_point
from dcdit.settings.schema import call_checked

LABELS = {KEYS[name]: HEADINGS[name] for name in KEYS}


@dataclass(frozen=True)
class Request:
    """What to report on.

    Attributes:
        runs: folders with results in or below them, or single results.
        out: folder for the report.
        title: of the page.
    """

    runs: list[str]
    out: str = "report"
    title: str = "Quality against compute"


def _source(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def figures(section: Section, prefix: str, out: Path) -> Iterable[dict[str, str]]:
    """Draw and save the plots of a section; yields them for the page."""
    metric = section.metrics[0]
    label, results = LABELS[metric], [result for s in section.series for point in s.points for result in point.results]
    places = {f"{each.values['device']}, batches of {each.values['timing']['batch_size']}" for each in results}
    words = "; ".join(sorted(places))

    plots: dict[str, tuple[str, Figure | None]] = {
        "kept_share": (
            "Tokens kept on the way from noise to image, at the least (solid) and the greatest (dotted) drop",
            kept_share(section),
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
            (out / f"{prefix}{name}.png").write_bytes(image.getvalue())
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
            routed = "kept" in point.results[0].values
            cells.append(_percent(point.figures("kept", "share")) if routed else "-")
            cells.append(f"{sum(point.figures('tflops_per_image')) / len(point.results):.4g}")
            cells.append(f"{sum(point.figures('milliseconds_per_image')) / len(point.results):.4g}")
            name = f"{series.name} ({series.network}, {series.first.values['parameters'] / 1e6:.3g}M)"
            yield {"name": name if number == 0 else "", "first": number == 0, "cells": cells}


def _percent(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.1%}"


def grids(section: Section) -> Iterable[dict[str, Any]]:
    """For each curve the strips of its first run."""
    for series in section.series:
        strips = [
            {"drop": f"{point.drop:g}", "source": _source(point.results[0].strip.read_bytes())}
            for point in series.points
            if point.results[0].strip is not None
        ]
        if strips:
            yield {"name": series.name, "strips": strips}


def save_points(results: Sequence[Result], out: Path) -> None:
    """The points as CSV, one flat row each, and as JSON with everything that is known of them."""
    flat = [result.row() for result in results]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    with (out / "points.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(flat)
    (out / "points.json").write_text(json.dumps([result.values for result in results], indent=1) + "\n")


def run(config: DictConfig) -> Path:
    """Write the report; returns the page."""
    values: Any = OmegaConf.to_container(config, resolve=True)
    request = call_checked(Request, values, "")
    results = read_results(request.runs)
    out = Path(request.out)
    out.mkdir(parents=True, exist_ok=True)
    save_points(results, out)
    shown = []
    arranged = arrange(results)
    for number, section in enumerate(arranged, 1):
        prefix = f"{number}_" if len(arranged) > 1 else ""
        headings = ["ρ", "seeds", *(LABELS[metric] for metric in section.metrics), "kept", "TFLOPs/image", "ms/image"]
        shown.append(
            {
                "words": section.described(),
                "headings": headings,
                "rows": list(rows(section)),
                "figures": list(figures(section, prefix, out)),
                "grids": list(grids(section)),
            }
        )
    template = Environment(loader=PackageLoader("dcdit", "evaluation"), autoescape=True).get_template("report.html")
    runs = len({result.values["run"] for result in results})
    page = out / "report.html"
    page.write_text(template.render(title=request.title, sections=shown, count=len(results), runs=runs))
    print(f"{len(results)} points of {runs} runs: {page}")
    return page


@hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name="report")
def main(config: DictConfig) -> None:
    """Hydra entry point."""
    run(config)


if __name__ == "__main__":
    entry_point(main, paths=True)
