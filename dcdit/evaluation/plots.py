"""Plots of quality against compute."""

from collections.abc import Sequence

import matplotlib
import numpy as np

from dcdit.evaluation.results import Section, Series

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_SIZE = (8.2, 4.6)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _colours(section: Section) -> dict[str, str]:
    palette = plt.get_cmap("tab10" if len(section.series) <= 10 else "tab20").colors  # type: ignore[attr-defined]
    return {series.name: palette[number % len(palette)] for number, series in enumerate(section.series)}


def _label(series: Series) -> str:
    seeds = max(len(point.results) for point in series.points)
    return verbatim(f"{series.name} ({series.network}" + (f", {seeds} seeds)" if seeds > 1 else ")"))


def verbatim(text: str) -> str:
    """A label as it stands: matplotlib would take dollars for formulas, and leave out what begins with "_"."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _finish(figure: Figure, axes: Axes) -> Figure:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def trade_off(section: Section, metric: str, cost: str, ylabel: str, xlabel: str) -> Figure:
    """A metric against a cost: a curve over the drop fractions for each series, a single point for a plain DiT.

    Where there are several training seeds, lines and marks are means and bars reach from the least to the greatest.

    Args:
        section: the curves.
        metric: its key among a result's metrics.
        cost: key of a result, ``tflops_per_image`` or ``milliseconds_per_image``.
        ylabel, xlabel: of the axes, with units.
    """
    figure, axes = plt.subplots(figsize=_SIZE, layout="constrained")
    for series, colour in zip(section.series, _colours(section).values(), strict=True):
        xs = [_mean(point.figures(cost)) for point in series.points]
        spread = [point.figures("metrics", metric) for point in series.points]
        ys = [_mean(values) for values in spread]
        bars = np.array([[y - min(values), max(values) - y] for y, values in zip(ys, spread, strict=True)]).T
        single = len(series.points) == 1
        axes.errorbar(
            xs,
            ys,
            yerr=bars if bars.any() else None,
            fmt="s" if single else "o-",
            markersize=7 if single else 4,
            capsize=2,
            linewidth=1.5,
            color=colour,
            label=_label(series),
        )
        if not single:
            for x, y, point in zip(xs, ys, series.points, strict=True):
                axes.annotate(
                    f"ρ {point.drop:g}", (x, y), xytext=(3, 4), textcoords="offset points", fontsize=7, color=colour
                )
    low, high = axes.get_ylim()
    missing = 0.2 * max(abs(low), abs(high)) - (high - low)
    if missing > 0:  # or differences that mean nothing would fill the plot
        axes.set_ylim(low - missing / 2, high + missing / 2)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return _finish(figure, axes)


def keep_ratio(section: Section) -> Figure | None:
    """Keep ratio over the timesteps, at the least and the greatest drop; None without any router."""
    routed = [series for series in section.series if "keep_ratio" in series.first.values]
    if not routed:
        return None
    figure, axes = plt.subplots(figsize=_SIZE, layout="constrained")
    colours = _colours(section)
    for series in routed:
        ends = {series.points[0].drop: "-", series.points[-1].drop: ":"} if len(series.points) > 1 else None
        for point in series.points:
            style = "-" if ends is None else ends.get(point.drop)
            if style is None:
                continue
            shares = np.mean([result.values["keep_ratio"]["conditional"] for result in point.results], axis=0)
            timesteps = point.results[0].values["keep_ratio"]["timesteps"]
            axes.plot(
                timesteps,
                100 * shares,
                style,
                color=colours[series.name],
                label=verbatim(f"{series.name}, ρ {point.drop:g}"),
            )
    axes.invert_xaxis()  # sampling runs from noise on the left to the image on the right
    axes.set_ylim(bottom=0)
    axes.set_xlabel("timestep (999 is pure noise)")
    axes.set_ylabel("keep ratio, % of all positions")
    return _finish(figure, axes)
