"""The tables that an evaluation and a scoring print, and the notes below them."""

from collections.abc import Callable

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from dcdit.evaluation.descriptions import (
    describe_capacity,
    describe_clipping,
    describe_comparability,
    describe_guiding_branch,
    describe_point,
    describe_reference,
    describe_rounding,
    describe_sampling,
    describe_step,
    describe_weights,
)
from dcdit.evaluation.plans import Comparison, MeasuredPlan
from dcdit.evaluation.results import Result
from dcdit.evaluation.scores import Score
from dcdit.evaluation.settings import figures_of_metrics
from dcdit.reporting.curves import best_of, describe_best, pareto

_COLUMNS: dict[str, Callable[[MeasuredPlan], str]] = {
    "weights": lambda plan: plan.weights,
    "guidance": lambda plan: f"{plan.guidance.scale:g}",
    "guiding branch": lambda plan: describe_guiding_branch(plan.guidance) or "-",
    "drop": lambda plan: f"{plan.guidance.drop_fraction:g}",
    "cache": lambda plan: f"{plan.sampler.cache:g}",
}
"""What distinguishes points, for the table."""


def table_of(results: list[Result]) -> Table:
    """Return a table of the figures, a row for each result; its title says what they stand for."""
    first, plan = results[0], results[0].plan
    sampler, guidance = plan.sampler, plan.guidance
    cells = {heading: [show(result.plan) for result in results] for heading, show in _COLUMNS.items()}
    varying = [heading for heading, values in cells.items() if heading == "drop" or len(set(values)) > 1]
    scale = "" if "guidance" in varying else f", guidance {guidance.scale:g}"
    weights = "" if "weights" in varying else f", {describe_weights(plan, first.ema_decay)}"
    cache = "" if "cache" in varying or not sampler.cache else f", cache {sampler.cache:g}"
    room = "" if plan.capacity is None else f", {describe_capacity(plan)}"
    same_branch = "guiding branch" not in varying and guidance.scale != 1
    branch = f", guiding branch: {describe_guiding_branch(guidance)}" if same_branch else ""
    title = (
        f"{first.run}, {describe_step(plan.step)}{weights}, {plan.precision}:"
        f" {plan.count} images, {plan.labels} labels, {describe_rounding(plan)},"
        f" {sampler.name} {sampler.steps} steps{describe_clipping(sampler)}{cache}{room}{scale}{branch}."
        f" Features of {plan.features.name}, {describe_reference(first)}."
        f" Time on {first.device}, batches of {first.timing.batch_size}"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    figures = figures_of_metrics(plan.metrics)
    several = len(results) > 1
    for heading in (*varying, *_headings(plan), "keep ratio", "TFLOPs", "ms/image", *(["Pareto"] if several else [])):
        table.add_column(heading, justify="right")
    front = {id(result) for result in pareto(results, figures[0])}
    for number, result in enumerate(results):
        row = [cells[heading][number] for heading in varying]
        row += _figures(result)
        row.append(f"{result.keep_ratio.mean:.1%}" if result.keep_ratio else "-")
        row += [f"{result.tflops_per_image:.3g}", f"{result.milliseconds_per_image:.3g}"]
        table.add_row(*row, *(["●" if id(result) in front else ""] if several else []))
    return table


def _headings(plan: Comparison) -> list[str]:
    """Return the headings of the figures, with arrows that point to better ones."""
    figures = figures_of_metrics(plan.metrics)
    return [f"{figure.heading} {'↑' if figure.higher_is_better else '↓'}" for figure in figures]


def _figures(result: Result | Score) -> list[str]:
    """Return the cells of the figures."""
    return [f"{result.figure(figure.key):.4g}" for figure in figures_of_metrics(result.plan.metrics)]


def table_of_score(score: Score) -> Group:
    """Return what the figures of images that exist stand for, and a table of them."""
    plan = score.plan
    title = (
        f"{score.source}: {plan.count} images, {describe_sampling(score)}."
        f" Features of {plan.features.name}, {describe_reference(score)}"
    )
    table = Table(box=box.SIMPLE_HEAD)
    for heading in _headings(plan):
        table.add_column(heading, justify="right")
    table.add_row(*_figures(score))
    return Group(Text(title), table)


def notes_on_score(score: Score) -> list[str]:
    """Return what the table does not say: how comparable the figures are."""
    notes = []
    if score.sampled is None:
        notes.append("Sampler, guidance and weights are not known; they belong beside the figures")
    return [*notes, describe_comparability(score.plan, score.sampled.plan if score.sampled else None)]


def notes_on(results: list[Result]) -> list[str]:
    """Return what the table does not say: the best guidance at each budget, and how comparable the figures are."""
    notes = [f"Best at its budget: {best}" for best in describe_best(results)]
    if len(results) > 1:
        figure = figures_of_metrics(results[0].plan.metrics)[0]
        best = best_of(results, figure)
        notes.append(f"Best of all: {figure.heading} {best.figure(figure.key):.4g}, {describe_point(best.plan)}")
        notes.append("●: no other point is both better and cheaper in TFLOPs")
    if any(result.plan.sampler.cache for result in results):
        notes.append("Keep ratios are means of all evaluations: of those that reused features none was kept")
    dropped = [(result.dropped_by_capacity, result) for result in results if result.dropped_by_capacity is not None]
    if dropped:
        worst, result = max(dropped, key=lambda pair: pair[0].share)
        text = worst.described(result.plan.capacity)
        notes.append(f"At {len(dropped)} of {len(results)} points, at the worst of them {text}")
    notes.append(describe_comparability(results[0].plan))
    return notes
