"""Plug-ins: what a command imports, what it never imports, and what a checkpoint says about them."""

import importlib
import json
import re
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.commands import typed
from support.configs import TINY, config_of
from support.plugins import forgotten, install, write_router

from dcdit.checkpoints.export import Card, write_exported
from dcdit.checkpoints.load import load_model, read_weights
from dcdit.checkpoints.resolve import resolve_checkpoint
from dcdit.checks import Table, named_entries
from dcdit.checks.tables import _TABLES
from dcdit.errors import UserError
from dcdit.evaluation.results import SCHEMA, read_result
from dcdit.network import DCDiT, build_network
from dcdit.network.registry import check_weights
from dcdit.network.routing import ROUTERS
from dcdit.runs.resume import resuming_command
from dcdit.sample import sample
from dcdit.settings import plugins
from dcdit.settings.plugins import ChangedPluginError, check_plugins, config_folders, load_plugins, plugins_of
from dcdit.train import train

PLAIN = Card(None, None, "", ())

pytestmark = pytest.mark.usefixtures("no_plugins")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder that Python looks for modules in."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def enter(module: str, code: str, **names: object) -> None:
    """Run ``code`` as that of a module."""
    exec(code, {"__name__": module, **names})


def write_experiment(configs: Path, name: str = "mine", router: str = "own") -> Path:
    file = configs / "experiment" / f"{name}.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(f"# @package _global_\ndefaults: [digits, _self_]\nmodel:\n  router: {router}\n")
    return file


# ---- tables ------------------------------------------------------------------------------------------------------


@pytest.fixture
def table():
    yield Table("imagined.key", {"ours": 1})
    del _TABLES["imagined.key"]


def test_a_table_knows_who_entered_what(table):
    enter("own_a", "table['a'] = 2; table.update(b=3)", table=table)
    enter("dcdit.imagined", "table['late'] = 4", table=table)
    enter("dcditto", "table['other'] = 5", table=table)
    assert {name: table.origin(name) for name in table} == {
        "ours": None,
        "late": None,
        "a": "own_a",
        "b": "own_a",
        "other": "dcditto",
    }
    assert list(named_entries({"imagined": {"key": "b"}})) == [(table, "b")]
    assert list(named_entries({"imagined": {"key": ["a", 3, "none"]}})) == [(table, "a"), (table, "none")]
    assert plugins_of({"imagined": {"key": ["b", "ours"]}}) == {"own_a": None}


def test_nobody_replaces_what_is_of_another(table):
    enter("own_a", "table['a'] = 2; table['a'] = 3", table=table)  # its own, as a notebook does
    assert table["a"] == 3
    with pytest.raises(UserError, match=r"imagined\.key=ours is of dcdit itself, and own_a would replace it"):
        enter("own_a", "table['ours'] = 2", table=table)
    with pytest.raises(UserError, match=r"imagined\.key=a is of own_a, and own_b would replace it"):
        enter("own_b", "table.update(a=2)", table=table)
    assert (table["ours"], table["a"]) == (1, 3)
    del table["a"]
    enter("own_b", "table['a'] = 2", table=table)
    assert table.origin("a") == "own_b"


# ---- what commands import ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["model.router=predictabilty"], "is not one of predictability, cosine: did you mean predictability?"),
        (
            ["model.router=own"],
            "is not one of predictability, cosine; if a plug-in has it, name that with plugins=[...]",
        ),
        (["experiment=digit"], "did you mean digits? available: "),
        (["experiment=mine"], "If a plug-in has it, name that with plugins=[...] available: "),
    ],
)
def test_a_name_that_is_not_known(folder, capsys, words, shown):
    result = typed(capsys, folder, "train", "experiment=digits", *words)
    assert result.status == 2
    assert shown in result.words


def test_printed_commands_name_the_plugins_that_were_named(folder, tiny, monkeypatch):
    write_router(folder, "my_router", "own")
    run = tiny("run", "plugins=[my_router]", "model.router=own", "trainer.max_steps=2")
    assert resuming_command(run).startswith("python -m dcdit.train 'plugins=[my_router]' resume=")
    monkeypatch.setattr(plugins, "_loaded", {})
    assert resuming_command(run).startswith("python -m dcdit.train resume=")


@pytest.mark.parametrize("way", ["key", "variable", "package"])
def test_each_way_to_name_a_plugin(folder, monkeypatch, capsys, way):
    package = way == "package"
    write_router(folder, "own_project.router" if package else "my_router", "own")
    write_experiment(folder / "own_project" / "configs" if package else folder / "configs")
    words = ["plugins=[my_router]"] if way == "key" else []
    if package:
        (folder / "own_project" / "__init__.py").write_text("import own_project.router")
        install(folder, "own-project", "1.2", "own_project")
    if way == "variable":
        monkeypatch.setenv("DCDIT_PLUGINS", " my_router, ")
    shown = typed(capsys, folder, "train", "--help", *words)
    assert shown.status == 0
    assert " mine " in shown.out
    assert not {"own_project", "my_router"} & set(sys.modules)  # help imports nothing
    shown = typed(capsys, folder, "train", "experiment=mine", "--cfg", "job", *words)
    assert yaml.safe_load(shown.out)["model"]["router"] == "own"
    module = "own_project.router" if package else "my_router"
    assert ROUTERS.origin("own") == module
    # by what a user names to have it, not by the part of the package that has the code
    recorded = {"own_project": "own-project 1.2"} if package else {"my_router": None}
    assert plugins_of({"model": {"router": "own"}}) == recorded


def test_commands_that_must_be_fast_import_no_plugin_before_they_need_one(folder, monkeypatch, capsys):
    write_router(folder, "my_router", "own")
    monkeypatch.setenv("DCDIT_PLUGINS", "my_router")
    for command in ("status", "report"):
        assert "no such key" not in typed(capsys, folder, command, str(folder)).words
        assert "my_router" not in sys.modules
    check_plugins({"plugins": {"my_router": None}, "model": {"router": "cosine"}})
    assert "my_router" in sys.modules


def test_report_imports_what_it_is_told_to(folder, capsys):
    write_router(folder, "my_router", "own")
    typed(capsys, folder, "report", str(folder), "plugins=[my_router]")
    assert "my_router" in sys.modules


def test_a_file_may_name_a_plugin(folder):
    write_router(folder, "my_router", "own")
    configs = folder / "elsewhere"
    file = write_experiment(configs)
    file.write_text(f"{file.read_text()}plugins: [my_router]\n")
    plugins.add_config_folder("--config-dir", str(configs))
    config = train.compose("experiment=mine")
    assert config.model["router"] in ROUTERS


def test_from_python(folder):
    write_router(folder, "my_router", "own")
    write_experiment(folder / "configs")
    assert train.compose("plugins=[my_router]", "experiment=mine").model["router"] == "own"


def test_a_folder_of_configurations_alone(folder, capsys):
    write_experiment(folder / "configs")
    for word in (["--config-dir=configs"], ["--config-dir", "configs"], ["-cd", "configs"]):
        assert " mine " in typed(capsys, folder, "train", "--help", *word).out
        shown = typed(capsys, folder, "train", *word, "experiment=mine", "--cfg", "job")
        assert yaml.safe_load(shown.out)["model"]["router"] == "own"
    assert " mine " not in typed(capsys, folder, "train", "--help").out


MISTAKES = {
    "plugins=[my_absent]": r"plugins=my_absent: there is no module my_absent\. Python looks for it in the current",
    "plugins=[my_package.absent]": r"there is no module my_package\.absent",
    "plugins=[my_needy]": r"my_needy cannot be imported, ModuleNotFoundError: No module named 'nothing' \(.*my_needy.py"
    r", line 2\)\. python -c 'import my_needy' shows the traceback",
    "plugins=[my_leaving]": r"my_leaving cannot be imported, SystemExit: 3",
    "plugins=[my_typo]": r"my_typo cannot be imported, SyntaxError: .*my_typo.py, line 1",
    "plugins=[my_thief]": r"plugins=my_thief: model\.router=cosine is of dcdit itself, and my_thief would replace it",
    "plugins=[my_router,my_second]": r"plugins=my_second: model\.router=own is of my_router, and my_second would",
    "plugins=[my_hider.part]": r"my_hider/configs/model/dcdit_b\.yaml has the name of \S*configs/model/dcdit_b\.yaml",
    "plugins=3": r"plugins=3",
    "plugins=[my-router]": r"plugins='my-router' is not the name of a module, such as my_router",
    "plugins=my_router.py": r"plugins='my_router.py' is a path, .* as Python imports it: plugins=\[my_router\]$",
    "plugins=[./my_router.py]": r"is a path, .* as Python imports it: plugins=\[my_router\]$",
    "plugins=[a/b/my_router.py]": r"is a path, .*: plugins=\[my_router\], and have Python find it: PYTHONPATH=a/b$",
    "plugins=[my_package/part.py]": r"is a path, .* as Python imports it: plugins=\[my_package\.part\]$",
    "plugins=[my_router],[my_second]": r"all runs of a sweep have the same plug-ins",
}


@pytest.mark.parametrize("word", MISTAKES)
def test_a_plugin_that_cannot_be_had_is_one_message(folder, capsys, monkeypatch, word):
    for name, router in (("my_router", "own"), ("my_second", "own"), ("my_thief", "cosine"), ("my_hider.part", "x")):
        write_router(folder, name, router)
    (folder / "my_needy.py").write_text("\nimport nothing\n")
    (folder / "my_leaving.py").write_text("raise SystemExit(3)\n")
    (folder / "my_typo.py").write_text("def\n")
    (folder / "my_package").mkdir()
    (folder / "my_package" / "__init__.py").touch()
    monkeypatch.chdir(folder)
    hidden = folder / "my_hider" / "configs" / "model" / "dcdit_b.yaml"
    hidden.parent.mkdir(parents=True)
    hidden.touch()
    with pytest.raises(UserError, match=MISTAKES[word]):
        sample.compose("checkpoint=x", word)
    result = typed(capsys, folder, "sample", "checkpoint=x", word)
    assert result.status == 2
    assert "Traceback" not in result.err


def test_a_single_name_needs_no_brackets(folder, capsys):
    write_router(folder, "my_router", "own")
    write_experiment(folder / "configs")
    shown = typed(capsys, folder, "train", "plugins=my_router", "experiment=mine", "--cfg", "job")
    assert yaml.safe_load(shown.out)["model"]["router"] == "own"
    assert train.compose("plugins=my_router", "experiment=mine").model["router"] == "own"
    assert resuming_command(folder).startswith("python -m dcdit.train 'plugins=[my_router]' resume=")


# ---- what a checkpoint says ------------------------------------------------------------------------------------------


def test_a_checkpoint_names_its_plugin_and_never_imports_it(folder, tiny, monkeypatch):
    write_router(folder, "my_router", "own")
    file = folder / "my_router.py"
    file.write_text(f"{file.read_text()}\nfrom pathlib import Path\nPath({str(folder / 'ran')!r}).touch()\n")
    exported = folder / "exported"
    with forgotten():
        load_plugins(["my_router"])
        run = tiny("run", "model.router=own", "trainer.max_steps=1")
        source = resolve_checkpoint(str(run), "runs")
        write_exported(exported, read_weights(source), "ema", "fp32", Card(None, None, "", ()))
        load_model(str(exported)).network.save_pretrained(folder / "saved")
    (folder / "ran").unlink()
    record = {"my_router": None}
    last = run / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["hyper_parameters"]["plugins"] == record
    assert "my_router" in (exported / "README.md").read_text()
    missing = r"model\.router='own' was made by the plug-in my_router, which is not loaded, .*plugins=\[my_router\]"
    for place in (exported, folder / "saved"):
        assert json.loads((place / "config.json").read_text())["plugins"] == record
        with pytest.raises(UserError, match=missing):
            DCDiT.from_pretrained(place)
    for place in (run, last, exported):
        with pytest.raises(UserError, match=missing):
            load_model(str(place))
    assert not (folder / "ran").exists()
    monkeypatch.setenv("DCDIT_PLUGINS", "my_router")
    for place in (run, exported):
        assert load_model(str(place)).network.spec["router"] == "own"
    assert type(DCDiT.from_pretrained(folder / "saved").router).__name__ == "Own"
    del ROUTERS["own"]  # as of another version of the plug-in
    with pytest.raises(UserError, match=r"my_router, which has no such entry here: install the version that had it"):
        load_model(str(run))


RENAMED = """
from torch import nn
from dcdit.network.routing import ROUTERS, CosineRouter


class Own(CosineRouter):
    def __init__(self, channels):
        super().__init__(channels)
        self.asking, self.key = self.query, nn.Linear(channels, 2 * channels, bias=False)
        del self.query


ROUTERS["own"] = Own
"""


def test_a_plugin_that_has_changed_since_is_named_and_the_file_is_not_blamed(folder, tiny):
    write_router(folder, "my_router", "own")
    exported = folder / "exported"
    with forgotten():
        load_plugins(["my_router"])
        run = tiny("run", "model.router=own", "trainer.max_steps=1")
        write_exported(exported, read_weights(resolve_checkpoint(str(run), "runs")), "ema", "fp32", PLAIN)
    (folder / "my_router.py").write_text(RENAMED)
    importlib.invalidate_caches()
    load_plugins(["my_router"])
    changed = (
        r"model\.router=own of the plug-in my_router: the file has router\.query\.weight, which the network lacks; the"
        r" network has router\.asking\.weight, which the file lacks; the file has router\.key\.weight of shape"
        r" \[32, 32\] \(the network: \[64, 32\]\)\. The code of the plug-in has probably changed"
    )
    for call in (
        lambda: load_model(str(run)),
        lambda: load_model(str(exported)),
        lambda: DCDiT.from_pretrained(exported),
        lambda: tiny("run", "model.router=own", "trainer.max_steps=2", "ckpt_path=last"),
    ):
        with pytest.raises(UserError, match=changed) as caught:
            call()
        assert "not written by" not in str(caught.value)


def test_what_differs_elsewhere_is_no_fault_of_the_plugin(folder):
    write_router(folder, "my_router", "own")
    load_plugins(["my_router"])
    spec = {**config_of(*TINY).model, "router": "own"}
    state = build_network(spec).state_dict()
    other = build_network({**spec, "depth": 2}).state_dict()
    assert isinstance(check_weights(spec, state), DCDiT)
    for wrong in (other, {**state, "router.more": torch.zeros(1), "embed.more": torch.zeros(1)}):
        with pytest.raises(UserError, match="has shape") as caught:
            check_weights(spec, wrong)
        assert not isinstance(caught.value, ChangedPluginError)
    with pytest.raises(ChangedPluginError, match=r"has router\.m0, router\.m1, router\.m2 and 1 more, which"):
        check_weights(spec, {**state, **{f"router.m{number}": torch.zeros(1) for number in range(4)}})
    with pytest.raises(ChangedPluginError, match=r"of the plug-in my_router: model\.size=3: there is no such key"):
        check_weights({**spec, "size": 3})


def test_what_a_notebook_made_is_told_before_and_after(folder, tiny, caplog):
    write_router(folder, "my_router", "own")
    code = (folder / "my_router.py").read_text()
    told = r"model\.router='?own'? was made in a script or notebook, .* such as my_plugin\.py"
    with forgotten():
        enter("__main__", code)
        run = tiny("run", "model.router=own", "trainer.max_steps=1")
        assert re.search(told, caplog.text)
        source = resolve_checkpoint(str(run), "runs")
        with pytest.raises(UserError, match=told):
            write_exported(folder / "exported", read_weights(source), "ema", "fp32", PLAIN)
        with pytest.raises(UserError, match=told):
            load_model(str(run)).network.save_pretrained(folder / "saved")
        assert not (folder / "exported").exists()
    with pytest.raises(UserError, match=told):
        load_model(str(run))
    load_plugins(["my_router"])  # where the remedy had it put
    write_exported(folder / "exported", read_weights(source), "ema", "fp32", PLAIN)
    assert json.loads((folder / "exported" / "config.json").read_text())["plugins"] == {"my_router": None}


def test_networks_of_ours_record_nothing(three_steps, folder):
    last = three_steps / "checkpoints" / "last.ckpt"
    assert "plugins" not in torch.load(last, weights_only=True)["hyper_parameters"]
    assert "plugins" not in yaml.safe_load((three_steps / "config.yaml").read_text())
    load_model(str(last)).network.save_pretrained(folder / "saved")
    assert "plugins" not in json.loads((folder / "saved" / "config.json").read_text())


def test_a_result_names_the_plugin_of_its_metric(folder):
    file = folder / "result.json"
    plan = {"metrics": ["fid", "mean"], "sampler": {"name": "heun"}}
    file.write_text(json.dumps({"schema": SCHEMA, "plan": plan, "plugins": {"my_metric": "my-project 2.0"}}))
    with pytest.raises(UserError, match=r"metrics='mean' was made by the plug-in my_metric \(of 'my-project 2\.0'\)"):
        read_result(file)


texts = st.text(max_size=8) | st.sampled_from(["json.tool", "this", "own.a", "__main__", "a..b", "x" * 300])
values = st.none() | st.integers() | texts | st.lists(texts, max_size=2)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@example({"this": None, "json.tool": "a 1"}, "own")
@given(values | st.dictionaries(texts, st.none() | texts, max_size=3), values)
def test_a_record_imports_nothing_whatever_it_says(record, model):
    before, found = set(sys.modules), config_folders()
    with suppress(UserError):
        check_plugins({"plugins": record, "model": {"router": model, "name": "dcdit"}})
    assert set(sys.modules) == before
    assert config_folders() == found
