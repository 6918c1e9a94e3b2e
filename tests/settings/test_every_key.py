"""Every key of every command is given what no user should give: one clear message, exit status 2, nothing done."""

import math
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf
from support import configs
from support.configs import compose_config

from dcdit.checks import checking
from dcdit.network import build_network
from dcdit.runtime.devices import without_memory
from dcdit.settings.compose import plain
from dcdit.settings.errors import USER_ERROR_STATUS, exit_with_message
from dcdit.settings.overrides import is_text

CHECKPOINT = "checkpoint=x"
COMMANDS = {
    "train": (
        *("experiment=digits", "alignment=repa", "alignment.grid=4"),
        *("callbacks=fid", "features@callbacks.fid.features=digits", "logger=csv"),
        f"callbacks.fid.reference={Path(__file__).parent}",  # a folder that exists
    ),
    "sample": (CHECKPOINT, "sampler=ddim"),
    "generate": (CHECKPOINT, "out=x", "sampler=dpm++"),
    "evaluate": (CHECKPOINT, "reference=x", "features=digits"),
    "score": ("images=x", "reference=x", "features=digits"),
    "report": ("runs=[x]",),
    "status": ("runs=[x]",),
    "flops": ("model=dcdit_digits",),
    "ema": (CHECKPOINT, "length=0.05"),
    "export": (CHECKPOINT, "out=x"),
    "extract": ("source=x", "out=x"),
    "inspect_latents": ("directory=x",),
    "explore": (),
}
MUON = ("experiment=digits", "optimizer=muon")
CLUSTER = ("experiment=digits", "cluster=slurm", "cluster.gpus_per_node=0", "cluster.tasks_per_node=2")

A_NUMBER = 424_242

MANY = {
    "a wrong type": "many",
    "a negative": -1,
    "zero": 0,
    "not a number": math.nan,
    "infinity": math.inf,
    "a group's name": "ddim",
    "an empty list": [],
}

EXTREMES = (None, 10**400, "", {}, [[None]], "x" * 100_000, "a\0b")
"""Tried in turn, two on each key; what they may be depends on the key."""

NULL_BUT_NUMBER = {
    *("ratio.curriculum_start", "gates.share", "execution.max_micro_batch", "data.scale", "model.encoder_width"),
    *("guidance.uncond_drop_fraction", "budget.tflops", "budget.fraction", "reference_count", "threads"),
    *("uncond_drop_fraction", "num_workers", "cluster.mem_gb", "encoder_grid", "max_images", "max_hours"),
    *("training.achieved_tflops", "count", "image_size"),
}
"""Keys whose default is null and that take a number."""

TEXT_OR_NUMBER = {"trainer.precision", "trainer.devices", "classes"}
"""Numbers, or words that stand for some."""

MAY_BE_ZERO = {
    *(
        "seed",
        "data.seed",
        "data.num_workers",
        "data.shuffle_buffer",
        "data.corrupt_limit",
        "corrupt_limit",
        "num_workers",
    ),
    *("examples.columns", "examples.guidance_scale"),
    *(
        "alignment.weight",
        "optimizer.weight_decay",
        "optimizer.lr_warmup_steps",
        "optimizer.momentum",
        "ratio.weight",
        "gates.weight",
        "ratio.curriculum_steps",
    ),
    *(
        "multi_budget.full_budget_steps",
        "multi_budget.path_drop",
        "model.label_dropout",
        "model.freq_shift",
        "trainer.gradient_clip_val",
        "guidance.scale",
    ),
    *("callbacks.ema.decay", "callbacks.fid.frames", "callbacks.fid.seed", "callbacks.fid.guidance.scale"),
    *(
        "guidance.drop_fraction",
        "guidance.uncond_drop_fraction",
        "uncond_drop_fraction",
        "sampler.eta",
        "sampler.cache",
    ),
    *(
        "diffusion.time_mean",
        "diffusion.velocity_cosine",
        "callbacks.fid.sampler.eta",
        "callbacks.fid.sampler.cache",
        "frames",
        "time_rounds",
        "images",
        "trainer.num_sanity_val_steps",
    ),
    *("cluster.gpus_per_node", "cluster.max_restarts", "logger.csv.flush_logs_every_n_steps"),
}
MAY_BE_NEGATIVE = {"diffusion.time_mean", "trainer.max_epochs", "trainer.devices", "trainer.num_sanity_val_steps"}

LIGHTNINGS_OWN = {"logger.csv.save_dir", "run_dir"}
"""Checked, if at all, by Lightning, whose words they are."""

LISTS_MAY_BE_EMPTY = {"plugins", "multi_budget.fractions", "cluster.setup", "callbacks.power_ema.lengths", "names"}


def check(command: str, config: DictConfig, key: str = "") -> None:
    """All that a command checks before it opens a file; of training, what ``key`` concerns."""
    if command != "train":
        settings = configs.check(import_module(f"dcdit.{command}"), config)
        if command == "flops":
            with without_memory():
                build_network(settings.model)
        return
    from dcdit import train
    from dcdit.cluster.settings import cluster_of, read_cluster
    from dcdit.data.datamodule import LatentDataModule
    from dcdit.training.build import build_trainer, check_network, match_compute
    from dcdit.training.callbacks.interrupt import StopOnInterrupt

    if "slurm" in str(config.cluster):
        read_cluster(plain(config)["cluster"])
    plan = match_compute(configs.check(train, config))
    if key.partition(".")[0] not in ("callbacks", "logger", "trainer", "cluster"):
        check_network(plan)
        checking.call_checked(LatentDataModule, plan.data, "data", {"features": plan.alignment.feature_source})
    if plan.cluster["name"] != "local":
        cluster_of(plan)
    if key.partition(".")[0] not in ("model", "optimizer", "ratio", "multi_budget"):
        build_trainer(plan, StopOnInterrupt())


def leaves(node: DictConfig, path: str = "") -> Iterator[tuple[str, object]]:
    """Keys that a user may set, with their values; what names a class or the resolution is not for setting."""
    for key in node:
        place = f"{path}.{key}" if path else str(key)
        if str(key) in ("_target_", "_convert_", "_recursive_", "name") or place in ("hydra", "paths", "resolution"):
            continue
        raw = None if OmegaConf.is_missing(node, key) else node[key]
        if isinstance(raw, DictConfig) and raw:
            yield from leaves(raw, place)
        else:
            yield place, OmegaConf.to_container(raw) if OmegaConf.is_config(raw) else raw


def outcome(command: str, config: DictConfig, capsys, key: str = "") -> str | None:
    """What the command says to ``config``; None if it has nothing to say. Anything but one message fails."""
    status = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.exit", lambda code: exits.append(code))
        exits: list[int] = []
        exit_with_message(lambda: check(command, config, key))
        status = exits[0] if exits else 0
    if not status:
        return None
    assert status == USER_ERROR_STATUS
    lines = [line.strip("│╭╮╰╯─ ") for line in capsys.readouterr().err.splitlines()]
    return " ".join(line for line in lines if line)


def is_refused(key: str, default: object, name: str) -> bool:
    """Whether this value must not pass."""
    if key in LIGHTNINGS_OWN:
        return False
    if isinstance(default, bool):
        return True
    if isinstance(default, list):
        return name != "an empty list" or key not in LISTS_MAY_BE_EMPTY
    number = isinstance(default, int | float) or key in NULL_BUT_NUMBER
    if name == "an empty list":
        return number or isinstance(default, str)
    if not number or key in TEXT_OR_NUMBER:
        return False
    if name == "a negative":
        return key not in MAY_BE_NEGATIVE
    return name != "zero" or key not in MAY_BE_ZERO


SOURCE = ("source=x", "out=x")
READERS = [
    ("extract", (*SOURCE, "reader=labels", "reader.labels=x")),
    ("extract", (*SOURCE, "reader=imagenet_val", "reader.devkit=x")),
    ("extract", (*SOURCE, "reader=parquet")),
    ("extract", (*SOURCE, "reader=torchvision", "reader.dataset=CIFAR10")),
]
CASES = [*COMMANDS.items(), ("train", CLUSTER), ("train", MUON), *READERS]
NAMES = [*COMMANDS, "train on a cluster", "train by muon", *(words[2] for _, words in READERS)]


@pytest.mark.parametrize(("command", "overrides"), CASES, ids=NAMES)
def test_no_value_passes_in_silence_or_ends_in_a_traceback(command, overrides, capsys, monkeypatch):
    monkeypatch.setattr("dcdit.training.batching.check_devices", lambda plan: None)
    whole = compose_config(*overrides, name=command)
    assert outcome(command, whole, capsys) is None
    found = dict(leaves(whole))
    if "cluster=slurm" in overrides:
        found = {key: value for key, value in found.items() if key.startswith("cluster.")}
    if "optimizer=muon" in overrides:
        found = {key: value for key, value in found.items() if key.startswith("optimizer.")}
    if any(word.startswith("reader=") for word in overrides):
        found = {key: value for key, value in found.items() if key.startswith("reader.")}
    wrong, texts, read_as_text = [], set(), checking._PLAIN[str]

    def noted(name: str, value: object) -> str:
        if value == A_NUMBER:
            texts.add(key)
        return read_as_text(name, value)

    monkeypatch.setitem(checking._PLAIN, str, noted)
    cls = getattr(import_module(f"dcdit.{command}"), command).config
    for number, (key, default) in enumerate(found.items()):
        extremes = {f"extreme {n}": EXTREMES[n % len(EXTREMES)] for n in (number, number + 3)}
        for name, value in {**MANY, "another number": A_NUMBER, **extremes}.items():
            config = whole.copy()
            OmegaConf.update(config, key, value, merge=False)
            said = outcome(command, config, capsys, key)
            last = key.rpartition(".")[2]
            if said is None and name in MANY and is_refused(key, default, name):
                wrong.append(f"{key}={value}: {name} passes")
            elif said is not None and value != A_NUMBER and key not in LIGHTNINGS_OWN:  # others may have to agree
                wrong += [f"{key}={value}: {said}"] * (len(said) > 600 or last not in said)
        number_wanted = isinstance(default, int | float) or key in NULL_BUT_NUMBER
        if is_text(key, cls) if number_wanted else key in texts and not is_text(key, cls):
            wrong.append(f"{key}: dcdit.settings.overrides.TEXT_KEYS is wrong about it")
    assert not wrong, "\n".join(wrong)


def sections() -> Iterator[tuple[str, str]]:
    for command, overrides in COMMANDS.items():
        config = compose_config(*overrides, name=command)
        for key in config:
            raw = config.get(key)
            if isinstance(raw, DictConfig) and key not in ("hydra", "paths", "resolution", "features"):
                yield command, str(key)


@pytest.mark.parametrize(("command", "section"), list(sections()))
def test_a_value_where_a_section_is_meant(command, section, capsys):
    for value in ("ddim", 0.1, []):
        config = compose_config(*COMMANDS[command], name=command)
        OmegaConf.update(config, section, value, merge=False)
        said = outcome(command, config, capsys)
        assert said is not None, value
        assert section in said
