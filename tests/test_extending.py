"""docs/extending.md, followed to the letter: its blocks are what is run here."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from support.configs import TINY, call, train
from support.runs import logged

from dcdit import evaluate, flops, generate, report, sample
from dcdit.cluster.settings import cluster_of, sbatch_parameters
from dcdit.errors import UserError
from dcdit.settings.compose import compose_values, configuration_of
from dcdit.settings.overrides import config_folder, plugins_named
from dcdit.settings.plugins import add_config_folder, load_plugins
from dcdit.training.settings import TrainConfig

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
BLOCK = re.compile(r"^`(\S+)` \(new\)\n\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL))
SMALL = tuple(word for word in TINY if not word.startswith("model."))
FEW = ("sampler.steps=2", "precision=fp32")


@pytest.fixture
def follow(tmp_path, monkeypatch, no_plugins):
    """Do what a section says, in a folder of its own; returns how to compose a configuration from then on."""

    def do(section: str):
        folder = tmp_path / "own" / section
        blocks = BLOCK.findall(SECTIONS[section])
        assert 1 <= len(blocks) <= 3
        for file, text in blocks:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text)
        monkeypatch.syspath_prepend(folder)
        words = " ".join(commands_of(section)).split()
        load_plugins(plugins_named(words))
        add_config_folder("--config-dir", str(folder / config_folder(words)) if config_folder(words) else None)

        def composed(*overrides: str, name: str = "train"):
            return compose_values(name, list(overrides))

        return composed

    return do


def commands_of(section: str) -> list[str]:
    block = re.findall(r"```bash\n(.*?)```", SECTIONS[section], flags=re.DOTALL)[-1]
    return block.replace("\\\n", " ").strip().splitlines()


@pytest.mark.parametrize("section", SECTIONS)
def test_the_commands_are_of_what_was_added(follow, section):
    composed = follow(section)
    for line in commands_of(section):
        words = [word for word in shlex.split(line)[2:] if "=" in word]
        assert composed(*words, name=shlex.split(line)[2].removeprefix("dcdit.")) is not None


@pytest.fixture
def trained(tmp_path, digits):
    """Train with a configuration; returns the run's directory and its last checkpoint."""

    def run(composed, *overrides: str, data: Path | None = digits) -> tuple[Path, Path]:
        run_dir = tmp_path / "run"
        run_dir.mkdir(exist_ok=True)
        places = [f"data.directory={data}"] if data else [f"paths.data={tmp_path}/data"]
        train(composed(*SMALL, *places, *overrides), run_dir)
        return run_dir, run_dir / "checkpoints" / "last.ckpt"

    return run


def step_of(checkpoint: Path) -> int:
    return torch.load(checkpoint, weights_only=True)["global_step"]


def test_a_third_network_goes_through_every_command(follow, trained, tmp_path, digits, capsys):
    composed = follow("A network")
    model = ("model=unet_digits", "model.grid=8", "multi_budget=none")
    words = [word for word in SMALL if not word.startswith("multi_budget.")]
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for steps, resume in ((2, "ckpt_path=null"), (4, "ckpt_path=last")):
        train(composed(*words, f"data.directory={digits}", *model, f"trainer.max_steps={steps}", resume), run_dir)
    last = run_dir / "checkpoints" / "last.ckpt"
    assert step_of(last) == 4
    with pytest.raises(UserError, match=r"multi_budget.fractions=.*U-Net drops no tokens, set multi_budget=none"):
        train(composed(*words, f"data.directory={digits}", *model[:2], "run_name=x", "multi_budget=wide"), tmp_path)

    places = (f"checkpoint={last}", f"out={tmp_path}/out", *FEW)
    call(sample, composed(*places, "per_class=1", name="sample"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"samples.png", "latents.npz"}
    call(generate, composed(*places[:1], f"out={tmp_path}/many", *FEW, "count=6", name="generate"))
    assert json.loads((tmp_path / "many" / "samples.json").read_text())["keep_ratio"] is None
    call(flops, composed("model=unet_digits", name="flops"))
    assert "coarse" in capsys.readouterr().out
    for override in ("budget.fraction=0.5", "guidance.drop_fraction=0.5"):
        with pytest.raises(UserError, match=r"U-Net (has one fixed cost|drops no tokens)"):
            call(sample, composed(*places, override, name="sample"))

    reference = (f"reference={digits}/val", "features=digits", "count=40", f"cache={tmp_path}/cache")
    (measured,) = call(evaluate, composed(*places[:1], *reference, *FEW, name="evaluate"))
    result = json.loads(measured.path.read_text())
    assert result["network"] == {"title": "U-Net", "routes": False}
    assert "keep_ratio" not in result
    page = call(report, composed(f"runs=[{run_dir}]", f"out={tmp_path}/report", name="report"))
    assert "U-Net" in page.read_text()


def test_a_router(follow, trained, tmp_path):
    composed = follow("A router")
    model = ("model.width=32", "model.depth=1", "model.encoder_width=16", "model.grid=8", "model.router=gradient")
    _, last = trained(composed, *model, "trainer.max_steps=3")
    weights = torch.load(last, weights_only=True)["current_model_state"]
    assert {"network.router.scale", "network.router.offset"} <= set(weights)
    out = call(sample, composed(f"checkpoint={last}", f"out={tmp_path}/out", "per_class=1", *FEW, name="sample"))
    assert (out / "boundaries.png").is_file()
    with pytest.raises(UserError, match=r"model\.router='gradeint' is not one of predictability, cosine, gradient"):
        trained(composed, *model[:-1], "model.router=gradeint")


def test_a_sampler_follows_the_same_way_as_ddim(follow):
    follow("A sampler")
    from dcdit.checks import build_named
    from dcdit.diffusion.guidance import GuidedOutput
    from dcdit.diffusion.samplers import Sampler, sample_generator
    from dcdit.diffusion.schedule import linear_betas
    from dcdit.diffusion.settings import DDIM, SAMPLERS

    alpha_bar = (1 - linear_betas()).cumprod(0)

    def denoise(x, timestep, y):  # exact for data N(0.7, 0.5^2)
        bar = alpha_bar[timestep].float()
        noise = (1 - bar).sqrt() * (x - bar.sqrt() * 0.7) / (bar * 0.25 + 1 - bar)
        return GuidedOutput(torch.cat([noise, torch.zeros_like(noise)], dim=1), (None,))

    def last(settings):
        streams = [sample_generator(0, number) for number in range(4)]
        return list(Sampler(settings).trajectory(denoise, (1, 4, 4), torch.zeros(4, dtype=torch.long), streams))[
            -1
        ].next

    naive = build_named(SAMPLERS, {"name": "naive", "steps": 500}, "sampler")
    torch.testing.assert_close(last(naive), last(DDIM(500)), rtol=0, atol=0.02)
    with pytest.raises(UserError, match=r"sampler\.eta=0\.5: there is no such key"):
        build_named(SAMPLERS, {"name": "naive", "steps": 5, "eta": 0.5}, "sampler")


def test_a_sampler_by_name(follow, tiny, tmp_path):
    composed = follow("A sampler")
    last = tiny("run", "trainer.max_steps=2") / "checkpoints" / "last.ckpt"
    words = (f"checkpoint={last}", f"out={tmp_path}/out", "sampler=naive", "per_class=1", *FEW)
    assert (call(sample, composed(*words, name="sample")) / "samples.png").is_file()


def test_a_loss_weighting(follow, tiny):
    with pytest.raises(UserError, match=r"diffusion\.weighting='floor' is not one of none, min_snr"):
        tiny("early", "diffusion.weighting=floor", "trainer.max_steps=1")
    follow("A loss weighting")
    for process in ("ddpm", "flow"):
        runs = [
            logged(
                tiny(
                    f"{process}_{weighting}",
                    f"diffusion={process}",
                    f"diffusion.weighting={weighting}",
                    "trainer.max_steps=1",
                )
            )
            for weighting in ("none", "floor")
        ]
        assert runs[0][0, "train/mse"] == runs[1][0, "train/mse"]
        assert runs[0][0, "train/diffusion_loss"] != runs[1][0, "train/diffusion_loss"]


def test_a_data_source(follow, trained, tmp_path):
    composed = follow("A data source")
    model = ("model.width=32", "model.depth=1", "model.encoder_width=16", "model.grid=8", "model.num_classes=2")
    _, last = trained(composed, "data=stripes", *model, "trainer.max_steps=3", data=None)
    assert torch.load(last, weights_only=True)["hyper_parameters"]["latents"]["classes"] == ["horizontal", "vertical"]
    assert (tmp_path / "data" / "stripes8" / "train" / "manifest.json").is_file()


def test_a_metric_and_a_feature_network(follow, tiny, tmp_path, digits, capsys):
    last = tiny("run", "trainer.max_steps=2") / "checkpoints" / "last.ckpt"
    composed = follow("A metric")
    places = (f"checkpoint={last}", f"reference={digits}/val", f"cache={tmp_path}/cache", "count=40", *FEW)
    (measured,) = call(evaluate, composed(*places, "features=digits", "metrics=[fid,mean]", name="evaluate"))
    result = json.loads(measured.path.read_text())
    assert measured.figure("mean_distance") == result["metrics"]["mean_distance"]
    with pytest.raises(UserError, match="kid was not measured: there are fid, mean_distance"):
        measured.figure("kid")
    assert result["metrics"]["mean_distance"] > 0
    assert "mean" in capsys.readouterr().out
    page = call(report, composed(f"runs=[{last.parents[1]}]", f"out={tmp_path}/report", name="report"))
    assert f"{result['metrics']['mean_distance']:.4g}" in page.read_text()
    composed = follow("A feature network")
    own = ("features=own", "features.module._target_=my_features.Coarse", "features.size=8", "metrics=[fid,kid]")
    (measured,) = call(evaluate, composed(*places, *own, f"out={tmp_path}/own", name="evaluate"))
    assert json.loads(measured.path.read_text())["plan"]["features"]["name"] == "Coarse"


def test_a_cluster_site(follow, tmp_path):
    composed = follow("A cluster site")
    plan = configuration_of(TrainConfig, composed("experiment=b_n4", "cluster=mysite"))
    parameters = sbatch_parameters(cluster_of(plan), "b_n4", tmp_path)
    assert (parameters["constraint"], parameters["gpus_per_node"], parameters["time"]) == ("a100", 4, 720)
    assert parameters["setup"] == ["module load cuda"]
    assert parameters["additional_parameters"]["exclusive"] is True


def test_every_section_has_a_test():
    assert set(SECTIONS) == {
        *("A router", "A network", "A sampler", "A loss weighting", "A data source", "A metric", "A feature network"),
        "A cluster site",
    }
