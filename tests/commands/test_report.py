"""The page of quality against compute, also as a browser shows it."""

import base64
import csv
import json
import re
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.commands import typed
from support.configs import PLAIN_DIT, call, compose_config

from dcdit import evaluate, report
from dcdit.checks import visible
from dcdit.errors import UserError
from dcdit.evaluation.descriptions import differences_from_published
from dcdit.evaluation.plans import MeasuredPlan
from dcdit.evaluation.settings import METRICS
from dcdit.reporting.collect import find_results, read_results
from dcdit.reporting.curves import arrange, describe_best, pareto
from dcdit.reporting.histories import curves_of, histories_below
from dcdit.reporting.plots import keep_ratio
from dcdit.runs.state import RunState, State
from dcdit.sample import sample
from dcdit.settings.overrides import with_paths

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
(FID,) = METRICS["fid"].figures
SETTINGS = ("features=digits", "count=40", "batch_size=20", "sampler.steps=3", "sampler.clip=true")

# what a person would notice first: pictures that did not load, a page wider than the window, errors
LOOK = """<script>addEventListener("load", () => {
  const images = [...document.images];
  document.body.dataset.seen = JSON.stringify({
    images: images.length,
    broken: images.filter((i) => !i.complete || !i.naturalWidth).length,
    nameless: images.filter((i) => !i.alt).length,
    outside: images.filter((i) => i.src.slice(0, 5) !== "data:").length,
    wide: document.documentElement.scrollWidth > innerWidth,
    rows: document.querySelectorAll("tbody tr").length,
  });
});</script>"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, digits):
    """Two seeds of a DC-DiT at two budgets, and a plain DiT, measured."""
    from support.configs import TINY, train

    root = tmp_path_factory.mktemp("runs")
    for name, drops, overrides in (
        ("small_sweep/seed_0", "[0,0.5]", ("seed=0",)),
        ("small_sweep/seed_1", "[0,0.5]", ("seed=1",)),
        ("plain <DiT>", "[0]", PLAIN_DIT),
    ):
        run = root / name
        run.mkdir(parents=True)
        train(compose_config(*TINY, f"data.directory={digits}", "trainer.max_steps=2", *overrides), run)
        config = compose_config("checkpoint=x", f"reference={digits}/val", *SETTINGS, name="evaluate")
        config.checkpoint, config.cache = str(run / "checkpoints" / "last.ckpt"), str(root / "cache")
        config.drop_fractions = json.loads(drops)
        call(evaluate, config)
    return root


def written(runs: Path, out: Path, *overrides: str) -> Path:
    return call(report, compose_config(f"runs=[{runs}]", f"out={out}", *overrides, name="report"))


def test_seeds_are_one_curve_and_baselines_points(runs):
    (section,) = arrange(read_results([str(runs)])[0])
    plain, small = sorted(section.series, key=lambda series: series.name)
    assert (plain.name, plain.network, len(plain.points)) == ("plain <DiT>", "DiT/2", 1)
    assert (small.name, small.network) == ("small", "DC-DiT")
    assert [(point.at, len(point.results)) for point in small.points] == [(0.0, 2), (0.5, 2)]
    seeds = {result.training["seed"] for result in small.points[0].results}
    assert seeds == {0, 1}


def test_what_was_measured_again_counts_once(runs, tmp_path):
    (path, *_) = (runs / "small_sweep").rglob("evaluation/*.json")
    values = json.loads(path.read_text())
    values["plan"]["batch_size"], values["metrics"]["fid"] = 7, -1.0
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "again.json").write_text(json.dumps(values))
    before, after = (read_results(places)[0] for places in ([str(runs)], [str(runs), str(tmp_path)]))
    assert len(after) == len(before)
    assert [each.metrics["fid"] for each in after].count(-1.0) == 1  # the newer one


@pytest.mark.parametrize("name", ["x" * 4000, "-" * 4000, "$" * 250, "\ud800\x1b[2J", "%s_"])
def test_a_run_may_have_any_name(runs, tmp_path, name):
    """Two seeds of one, and it does not take longer."""
    for number, file in enumerate(sorted((runs / "small_sweep").rglob("evaluation/*_drop0_*.json"))):
        values = json.loads(file.read_text())
        values["run"] = f"{name}{number}"
        written_result(values, tmp_path / "in" / "evaluation" / f"{number}.json")
    begin = time.monotonic()
    page = written(tmp_path / "in", tmp_path / "out")
    assert time.monotonic() - begin < 20
    assert visible(name).strip("-_") in page.read_text()
    values["run"] = "x" * 5000
    written_result(values, tmp_path / "long.json")
    with pytest.raises(UserError, match=r"run=.* is not a text of at most 4,096 characters"):
        read_results([str(tmp_path / "long.json")])


def changed(runs, to, **plan):
    """A result of another plan, beside ``runs``."""
    (path, *_) = (runs / "small_sweep").rglob("evaluation/*_drop0_*.json")
    values = json.loads(path.read_text())
    for key, value in plan.items():
        if isinstance(value, dict):
            values["plan"][key].update(value)
        else:
            values["plan"][key] = value
    return written_result(values, to)


def written_result(values, to):
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(json.dumps(values))
    return values


def test_other_settings_are_another_section(runs, tmp_path):
    changed(runs, tmp_path / "evaluation" / "other.json", rounding="truncate")
    sections = arrange(read_results([str(runs), str(tmp_path)])[0])
    assert [len(section.results) for section in sections] in ([5, 1], [1, 5])
    page = written(runs, tmp_path / "report", f"runs=[{runs},{tmp_path}]")
    plots = {file.name for file in page.parent.glob("*.png")}
    assert {"1_keep_ratio.png", "2_keep_ratio.png"} <= plots
    assert len([name for name in plots if "tflops" in name]) == 1  # a single point is no trade-off
    assert page.read_text().count('<h2 id="s') == page.read_text().count('<li><a href="#s') == 2


def test_caching_makes_curves_of_one_section(runs, tmp_path):
    changed(runs, tmp_path / "evaluation" / "cached.json", sampler={"cache": 0.2})
    (section,) = arrange(read_results([str(runs), str(tmp_path)])[0])
    caches = [{r.plan.sampler.cache for point in s.points for r in point.results} for s in section.series]
    assert sorted(caches, key=sum) == [{0.0}, {0.0}, {0.2}]


def test_a_grid_of_guidance(runs, tmp_path):
    """FID over the scale at each budget, the best of each, and the front; scale 1 stands on every curve."""
    expected = {}
    for weak, rho in (("uncond", None), ("uncond", 0.9), ("budget", 0.9)):
        for scale, fid in ((1.5, 20.0), (2.0, 10.0 if weak == "uncond" else 25.0), (3.0, 30.0)):
            guidance = {"scale": scale, "weak": weak, "uncond_drop_fraction": rho}
            fid -= 2.0 if rho else 0.0
            values = changed(runs, tmp_path / "evaluation" / f"{weak}{rho}{scale}.json", guidance=guidance)
            values["metrics"]["fid"], values["tflops_per_image"] = fid, 2.0 if rho is None else 1.5
            written_result(values, tmp_path / "evaluation" / f"{weak}{rho}{scale}.json")
            expected[weak, rho, scale] = fid
    alone = changed(runs, tmp_path / "evaluation" / "alone.json")
    alone["metrics"]["fid"], alone["tflops_per_image"] = 40.0, 1.0
    written_result(alone, tmp_path / "evaluation" / "alone.json")
    results, _ = read_results([str(tmp_path)])
    (section,) = arrange(results)
    assert len(section.results) == 10
    assert [[point.at for point in series.points] for series in section.scales] == [[1.0, 1.5, 2.0, 3.0]] * 3
    names = {series.name.partition(", ")[2]: series for series in section.scales}
    assert set(names) == {
        *("guiding branch: no class", "guiding branch: no class at ρ 0.9", "guiding branch: same class at ρ 0.9")
    }
    assert [point.figures(FID) for point in names["guiding branch: same class at ρ 0.9"].points] == [
        *([40.0], [18.0], [23.0], [28.0])
    ]
    assert sorted(describe_best(results)) == [
        "FID 10 at guidance 2 (ema weights, ρ 0, guiding branch: no class)",
        "FID 18 at guidance 1.5 (ema weights, ρ 0, guiding branch: same class at ρ 0.9)",
        "FID 8 at guidance 2 (ema weights, ρ 0, guiding branch: no class at ρ 0.9)",
    ]
    front = [(each.tflops_per_image, each.figure("fid")) for each in pareto(results, section.figures[0])]
    assert front == [(1.0, 40.0), (1.5, 8.0)]
    page = written(runs, tmp_path / "report", f"runs=[{tmp_path}]")
    assert {"guidance.png", "tflops.png"} <= {file.name for file in page.parent.glob("*.png")}
    text = page.read_text()
    assert text.count("Best") == 1
    assert "Best guidance at each budget: " in text
    assert "; FID 8 at guidance 2 (ema weights" in text
    assert text.count("front") >= 2


def test_what_makes_figures_comparable_with_published_ones(runs, tmp_path):
    published = {
        "features": {"name": "inception-v3-compat"},
        "reference": {"published": ["features", "spatial"], "count": 10_000},
        "metrics": ["fid", "kid", "is", "prc"],
        "count": 50_000,
    }
    values = changed(runs, tmp_path / "evaluation" / "as.json", **published)
    assert differences_from_published(MeasuredPlan.of(values["plan"])) == []
    page = written(runs, tmp_path / "one", f"runs=[{tmp_path}]").read_text()
    assert "Measured as\npublished figures are" in page
    assert "against the statistics of the whole set in" in page
    for change, words in (
        ({"labels": "balanced"}, "balanced labels instead of random ones"),
        ({"count": 10_000}, "10,000 images instead of 50,000"),
        ({"precision": "bf16"}, "sampled in bf16"),
        ({"reference": {"published": [], "count": 10_000}}, "FID against images instead of the statistics"),
        ({"reference": {"published": ["features"]}, "metrics": ["fid", "sfid"]}, "sFID against images"),
        ({"reference": {"published": ["features"], "count": 5000}}, "recall against 5,000 images instead of 10,000"),
        ({"features": {"name": "digits classifier"}}, "features of digits classifier instead of"),
    ):
        values = changed(runs, tmp_path / "two" / "x.json", **{**published, **change})
        (found,) = differences_from_published(MeasuredPlan.of(values["plan"]))
        assert words in found


def test_measurements_as_csv_and_json(runs, tmp_path):
    folder = written(runs, tmp_path / "report").parent
    with (folder / "measurements.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    results = json.loads((folder / "measurements.json").read_text())
    files = [*runs.rglob("evaluation/*.json")]
    assert sorted(map(json.dumps, results)) == sorted(json.dumps(json.loads(file.read_text())) for file in files)
    by_run = {(row["run"], float(row["drop_fraction"])): row for row in rows}
    for result in results:
        row = by_run[result["run"], result["plan"]["guidance"]["drop_fraction"]]
        assert float(row["fid"]) == result["metrics"]["fid"]
        assert float(row["tflops_per_image"]) == result["tflops_per_image"]
        assert (row["weights"], row["sampler_steps"], row["count"]) == ("ema", "3", "40")
        assert row["features"] == "digits classifier"
    for name in ("tflops", "milliseconds", "keep_ratio"):
        with Image.open(folder / f"{name}.png") as image:
            assert np.asarray(image.convert("L")).std() > 10


def test_the_page_is_one_file_and_names_are_escaped(runs, tmp_path):
    text = written(runs, tmp_path / "report").read_text()
    assert "plain &lt;DiT&gt;" in text
    assert "<DiT>" not in text
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", text)
    assert "http" not in text


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1200, 420])
def test_the_page_in_a_browser(runs, tmp_path, width):
    page = written(runs, tmp_path / "report")
    looked = page.with_name("looked.html")
    looked.write_text(page.read_text().replace("</body>", f"{LOOK}</body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += ["--virtual-time-budget=10000", f"--window-size={width},900", "--dump-dom", looked.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    seen = json.loads(re.search(r'data-seen="([^"]*)"', shown)[1].replace("&quot;", '"'))
    assert seen == {"images": 8, "broken": 0, "nameless": 0, "outside": 0, "wide": False, "rows": 6}


def test_a_run_that_was_never_evaluated_has_its_curves_and_pictures(trained_run, tmp_path, capsys):
    """Loss, keep ratio with what was asked for, FID, and of six validations four pictures of samples."""
    log = trained_run / "logs" / "version_7" / "metrics.csv"
    log.parent.mkdir()
    log.write_text("step,val/fid@0,val/fid@0.3\n1,50,60\n3,40,45\n")
    (trained_run / "validation").mkdir()
    for step in range(6):
        for kind in ("samples", "boundaries"):
            Image.new("L", (4, 4)).save(trained_run / "validation" / f"step_{step:08d}_{kind}.png")
    (trained_run / "validation" / "step_00000009_samples.png").write_text("no picture")
    (trained_run / "validation" / "step_00000008_boundaries.png").symlink_to("/etc/hostname")
    page = written(trained_run, tmp_path / "report")
    assert {path.name for path in page.parent.glob("*.png")} == {
        *("training_loss.png", "training_keep.png", "training_fid.png"),
    }
    text = page.read_text()
    for step in (0, 2, 3, 5):
        assert f"step_{step:08d}_samples" in text
    assert "step_00000001_samples" not in text
    assert "step_00000005_boundaries" in text
    assert text.count("<img") == 3 + 4 + 1
    assert "Nothing was measured yet" in text
    assert "0 measurements of 0 runs, the course of 1 run" in capsys.readouterr().out
    drawn = curves_of(histories_below([str(trained_run)]))
    assert [line.label.rpartition(", ")[2] for line in drawn["FID at validations"]] == ["ρ 0", "ρ 0.3"]
    assert drawn["FID at validations"][1].values == [60.0, 45.0]
    assert histories_below([str(trained_run)])[0].target == 0.25


def test_a_run_has_the_same_name_in_results_and_curves(runs, tmp_path):
    for place in ("a_sweep/one", "b", "elsewhere/b"):
        logs = tmp_path / place / "logs" / "version_0"
        logs.mkdir(parents=True)
        RunState(State.RUNNING).write(tmp_path / place)
        (logs / "metrics.csv").write_text("step,train/diffusion_loss\n1,1\n")
    names = {run.path.relative_to(tmp_path).as_posix(): run.name for run in histories_below([str(tmp_path)])}
    assert names == {"a_sweep/one": "a/one", "b": "b", "elsewhere/b": "elsewhere/b"}  # a name that two have is a path
    results = {result.run for result in read_results([str(runs)])[0]}
    assert {run.name for run in histories_below([str(runs)])} == results


def test_the_time_axis_is_that_of_the_process(runs):
    results = read_results([str(runs)])[0]
    euler = sample.compose("checkpoint=x", "sampler=euler").sampler
    flow = [replace(result, plan=replace(result.plan, sampler=euler)) for result in results]
    labels = [keep_ratio(arrange(some)[0]).axes[0].get_xlabel() for some in (results, flow)]
    assert labels == ["timestep (999 is pure noise)", "1000 t (1000 is pure noise)"]


def test_the_command_takes_bare_paths(runs, tmp_path, capsys):
    places = [str(runs / "small_sweep"), str(runs / "plain <DiT>")]
    result = typed(capsys, tmp_path, "report", *places, f"out={tmp_path}/page")
    assert result.status == 0, result.err
    assert "5 measurements of 3 runs" in result.out
    assert (tmp_path / "page" / "report.html").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"page"}
    wrong = typed(capsys, tmp_path, "report", "nowhere")
    assert wrong.status == 2
    assert "runs=nowhere does not exist" in wrong.err


def test_runs_that_have_nothing_to_show_are_named(runs, tmp_path, capsys):
    """A folder without a run, and a run that has not begun; not the runs that were measured alone."""
    (tmp_path / "empty").mkdir()
    begun = tmp_path / "sweep" / "begun"
    begun.mkdir(parents=True)
    RunState(State.WAITING).write(begun)
    places = (runs, tmp_path / "empty", tmp_path / "sweep")
    page = written(runs, tmp_path / "report", f"runs=[{','.join(map(str, places))}]").read_text()
    named = [f"Left out: {folder} has neither curves nor results" for folder in (begun, tmp_path / "empty")]
    assert [line for line in capsys.readouterr().out.splitlines() if "Left out" in line] == named
    assert re.findall("Left out: .* has neither curves nor results", page) == named


def test_mistakes(tmp_path):
    assert with_paths(["a b", "out=x", "c"]) == ["out=x", 'runs=["a b","c"]']
    assert with_paths(["--help"]) == ["--help"]
    assert with_paths(["--cfg", "job", "job"]) == ["--cfg", "job", 'runs=["job"]']
    with pytest.raises(UserError, match="two ways to say the same"):
        with_paths(["a", "runs=[b]"])
    with pytest.raises(UserError, match=r"no results there, python -m dcdit\.evaluate writes them"):
        written(tmp_path, tmp_path / "report")
    assert find_results([str(tmp_path)]) == ([], [])
    with pytest.raises(UserError, match="runs is not set"):
        call(report, compose_config(name="report"))
    assert not (tmp_path / "report").exists()


def test_a_damaged_result_is_named(tmp_path):
    (tmp_path / "evaluation").mkdir()
    for content, message in (("{", "it is no JSON"), ('{"schema": 0}', "another release"), ("{}", "is no result")):
        (tmp_path / "evaluation" / "x.json").write_text(content)
        with pytest.raises(UserError, match=rf"x\.json.*{message}"):
            read_results([str(tmp_path)])


def change(values: dict, key: str, value: object) -> None:
    """Set a dotted key of nested values."""
    *way, last = key.split(".")
    for name in way:
        values = values[name]
    values[last] = value


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("run", ["x"], r"run=\['x'\] is a list"),
        ("tflops_per_image", -1.0, "tflops_per_image=-1 is negative"),
        ("metrics.fid", "low", "metrics.fid='low' is not a number"),
        ("plan.metrics", ["fid", "best"], "plan.metrics='best' is not one of"),
        ("plan.guidance.drop_fraction", 1.5, r"plan.guidance.drop_fraction=1.5 is outside"),
        ("plan.sampler.steps", 10**12, "plan.sampler.steps=1000000000000 is outside"),
        ("keep_ratio.timesteps", [1.0], "keep_ratio has not as many ratios as timesteps"),
        ("training", None, "training=null is no section"),
    ],
)
def test_one_bad_result_does_not_take_the_report_down(runs, tmp_path, capsys, key, value, message):
    (path, *_) = (runs / "small_sweep").rglob("evaluation/*.json")
    values = json.loads(path.read_text())
    change(values, key, value)
    (tmp_path / "evaluation").mkdir()
    bad = tmp_path / "evaluation" / "bad.json"
    bad.write_text(json.dumps(values))
    results, left_out = read_results([str(runs), str(tmp_path)])
    assert len(results) == 5
    assert len(left_out) == 1
    assert re.search(message, left_out[0])
    assert str(bad) in left_out[0]
    page = written(runs, tmp_path / "report", f"runs=[{runs},{tmp_path}]")
    assert "Left out: " in capsys.readouterr().out
    assert "Left out: " in page.read_text()


def test_what_a_stranger_may_call_a_run_is_shown_as_it_is(runs, tmp_path):
    """Formulas, markup and links: nothing of it is followed, and the page is drawn."""
    (path, *_) = (runs / "small_sweep").rglob("evaluation/*.json")
    secret = tmp_path / "secret.png"
    secret.write_bytes(path.with_suffix(".png").read_bytes() + b"do not follow")
    for number, name in enumerate(("a$\\frac{$b", "<script>alert(1)</script>", "=cmd()", "_hidden", "[red]x[/]")):
        values = json.loads(path.read_text()) | {"run": name}
        file = tmp_path / "stranger" / str(number) / "evaluation" / "x.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(values))
        file.with_suffix(".png").symlink_to(secret)
    page = call(report, compose_config(f"runs=[{tmp_path}/stranger]", f"out={tmp_path}/report", name="report"))
    text = page.read_text()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert base64.b64encode(secret.read_bytes()).decode() not in text
    assert "'=cmd()" in (tmp_path / "report" / "measurements.csv").read_text()
