"""Plots of quality against compute."""

from collections.abc import Callable, Sequence
from statistics import fmean

import matplotlib
import numpy as np

from dcdit.checks import visible
from dcdit.evaluation.results import Result
from dcdit.evaluation.settings import Figure
from dcdit.reporting.curves import Section, Series, pareto
from dcdit.reporting.histories import Curve

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure as PlotFigure

_SIZE = (8.2, 4.6)
_LONGEST_LABEL = 80


def _colours(curves: Sequence[Series]) -> list[str]:
    palette = plt.get_cmap("tab10" if len(curves) <= 10 else "tab20").colors  # type: ignore[attr-defined]
    return [palette[number % len(palette)] for number in range(len(curves))]


def _label(series: Series) -> str:
    seeds = max(len(point.results) for point in series.points)
    network = f" ({series.network})" if series.label == series.name else ""  # else all are of one
    return verbatim(f"{series.label}{network}" + (f", {seeds} seeds" if seeds > 1 else ""))


def verbatim(text: str) -> str:
    """Return a label as it stands, on one line, its middle left out where it is too long to be laid out beside a plot.

    matplotlib would take dollars for formulas, and leave out what begins with "_".
    """
    text = visible(text)
    if len(text) > _LONGEST_LABEL:
        text = f"{text[: _LONGEST_LABEL // 2]}…{text[-_LONGEST_LABEL // 2 + 1 :]}"
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _finish(figure: PlotFigure, axes: Axes, measured: Figure | None = None) -> PlotFigure:
    if measured is not None:
        axes.set_ylabel(measured.heading)
        low, high = axes.get_ylim()
        missing = 0.2 * max(abs(low), abs(high)) - (high - low)
        if missing > 0:  # or differences that mean nothing would fill the plot
            axes.set_ylim(low - missing / 2, high + missing / 2)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    entries = len(axes.get_legend_handles_labels()[0])
    figure.legend(loc="outside right upper", fontsize=8 if entries <= 14 else 6, frameon=False)
    return figure


def history_plot(curves: Sequence[Curve], ylabel: str, targets: Sequence[float]) -> PlotFigure:
    """Plot curves over the steps of training, one colour for each run.

    Args:
        curves: of any number of runs.
        ylabel: of the axis.
        targets: values to mark, such as the keep ratios that training aimed at.
    """
    figure, axes = plt.subplots(figsize=_SIZE, layout="constrained")
    palette = plt.get_cmap("tab10" if max(curve.run for curve in curves) < 10 else "tab20")
    for curve in curves:
        few = curve.marked or len(curve.values) < 3
        style = {"marker": "o", "markersize": 4, "linestyle": "--"} if few else {"linewidth": 1.2}
        axes.plot(curve.steps, curve.values, color=palette(curve.run), label=verbatim(curve.label), **style)
    for target in targets:
        axes.axhline(target, color="black", linestyle=":", linewidth=1, label=f"asked for: {target:.3g}")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(ylabel)
    if ylabel == "diffusion loss" and min(min(curve.values) for curve in curves) > 0:
        axes.set_yscale("log")
    return _finish(figure, axes)


def trade_off(
    section: Section, measured: Figure, cost: Callable[[Result], float], xlabel: str, front: bool = False
) -> PlotFigure:
    """Plot a figure against a cost: a curve over the drop fractions for each series, a single point for a plain DiT.

    Where there are several training seeds, lines and marks are means and bars reach from the least to the greatest.

    Args:
        section: the curves.
        measured: of each result.
        cost: what a result's images cost.
        xlabel: of the axis, with units.
        front: draw the Pareto front as well.
    """
    figure, axes = plt.subplots(figsize=_SIZE, layout="constrained")
    for series, colour in zip(section.series, _colours(section.series), strict=True):
        xs = [fmean(point.values(cost)) for point in series.points]
        ys = _draw(axes, series, xs, measured, colour)
        if len(xs) > 1:
            for x, y, point in zip(xs, ys, series.points, strict=True):
                label = f"{section.axis.symbol} {point.at:g}"
                axes.annotate(label, (x, y), xytext=(3, 4), textcoords="offset points", fontsize=7, color=colour)
    if front:
        best = pareto(section.results, measured)
        xs, ys = [cost(result) for result in best], [result.figure(measured.key) for result in best]
        axes.plot(xs, ys, "--", color="black", linewidth=1, label="Pareto front", zorder=3)
    axes.set_xlabel(xlabel)
    axes.ticklabel_format(axis="x", scilimits=(-2, 4))
    return _finish(figure, axes, measured)


def over_scale(section: Section, measured: Figure) -> PlotFigure:
    """Plot a figure over the guidance scale: a curve for each budget, its best point marked."""
    figure, axes = plt.subplots(figsize=_SIZE, layout="constrained")
    for series, colour in zip(section.scales, _colours(section.scales), strict=True):
        xs = [point.at for point in series.points]
        ys = _draw(axes, series, xs, measured, colour)
        best = measured.best(range(len(ys)), key=ys.__getitem__)
        axes.plot(xs[best], ys[best], "*", markersize=13, color=colour)
    axes.set_xlabel("guidance scale")
    return _finish(figure, axes, measured)


def _draw(axes: Axes, series: Series, xs: list[float], measured: Figure, colour: str) -> list[float]:
    """Draw one curve of means, and bars where seeds differ; return the means."""
    spread = [point.figures(measured) for point in series.points]
    ys = [fmean(values) for values in spread]
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
    return ys


def keep_ratio(section: Section) -> PlotFigure | None:
    """Plot the main branch's keep ratio over the timesteps, at the least and greatest drop; None without a router."""
    routed = [series for series in section.series if series.first.keep_ratio]
    if not routed:
        return None
    figure, axes = plt.subplots(figsize=_SIZE, layout="constrained")
    colours = dict(zip(map(id, section.series), _colours(section.series), strict=True))
    for series in routed:
        ends = {series.points[0].at: "-", series.points[-1].at: ":"} if len(series.points) > 1 else None
        for point in series.points:
            style = "-" if ends is None else ends.get(point.at)
            if style is None:
                continue
            ratios = [result.keep_ratio for result in point.results if result.keep_ratio]
            axes.plot(
                ratios[0].timesteps,
                100 * np.mean([ratio.main for ratio in ratios], axis=0),
                style,
                color=colours[id(series)],
                label=verbatim(f"{series.label}, {section.axis.symbol} {point.at:g}"),
            )
    axes.invert_xaxis()  # sampling runs from noise on the left to the image on the right
    axes.set_ylim(bottom=0)
    flow = section.results[0].plan.sampler.process == "flow"  # which all results of a section share
    axes.set_xlabel("1000 t (1000 is pure noise)" if flow else "timestep (999 is pure noise)")
    axes.set_ylabel("keep ratio, % of all positions")
    return _finish(figure, axes)
