"""Exported folders as pipelines of diffusers: the pixels of ``dcdit sample``, in a process that has no dcdit."""

import ast
import builtins
import re
import shutil
import subprocess
import symtable
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.commands import typed
from support.hub import hub_of

from dcdit.checkpoints.export import Card, write_exported
from dcdit.checkpoints.load import Weights, read_weights
from dcdit.checkpoints.resolve import resolve_checkpoint
from dcdit.data.autoencoder import load_autoencoder
from dcdit.data.latents import LatentSpec
from dcdit.network import build_network
from dcdit.sampling.bundle import gather
from dcdit.sampling.exported import network_code, pipeline_files

CARD = Card(None, None, "", [])
SIZES = {"grid": 8, "num_classes": 3, "width": 32, "depth": 2, "heads": 2}
NETWORKS = {
    "ddpm": ({"name": "dcdit", "encoder_width": 16, "groups": 8, "channels": 4}, {"name": "ddpm"}),
    "flow": (
        {"name": "dcdit", "encoder_width": 16, "groups": 8, "channels": 1, "variance": False, "gates": True}
        | {"norm": "rms", "mlp": "swiglu", "position": "rope", "qk_norm": True, "time_input": "unit"},
        {"name": "flow", "shift": 3.0, "prediction": "x"},
    ),
    "dit": ({"name": "dit", "patch": 2, "channels": 1}, {"name": "ddpm"}),
}
OURS = {
    "ddpm": ("sampler=ddim", "sampler.eta=0.5", "guidance.drop_fraction=0.3", "guidance.uncond_drop_fraction=0.7"),
    "flow": ("sampler=heun", "guidance.drop_fraction=0.5", "guidance.interval=[100,900]", "guidance.every=2"),
    "dit": ("sampler=auto",),
    "digits": ("sampler=dpm++", "sampler.clip=true", "sampler.cache=0.2", "guidance.drop_fraction=0.2"),
}
THEIRS = {
    "ddpm": {"sampler": "ddim", "sampler_options": {"eta": 0.5}, "drop_fraction": 0.3, "uncond_drop_fraction": 0.7},
    "flow": {"sampler": "heun", "drop_fraction": 0.5, "guidance_options": {"interval": [100, 900], "every": 2}},
    "dit": {},
    "digits": {"sampler": "dpm++", "sampler_options": {"clip": True, "cache": 0.2}, "drop_fraction": 0.2},
}
"""The same samplings, told to ``dcdit sample`` and to the pipeline."""
CLASSES = {name: [0, "dog"] for name in NETWORKS} | {"digits": [0, 7]}

BESIDE = """
import sys
sys.modules["dcdit"] = None
import numpy as np, torch
torch.set_num_threads({threads})
from diffusers import DiffusionPipeline
def load(name, **options):
    return DiffusionPipeline.from_pretrained({folder!r} + "/" + name, trust_remote_code=True, **options)
"""
SAMPLE = """
calls = {calls!r}
pipelines = {{name: load(name) for name in calls}}  # all at once: none may disturb another
for name, call in calls.items():
    output = pipelines[name](**call)
    latents = pipelines[name](**call, output_type="latent", batch_size=3).images
    images = np.stack([np.asarray(image.convert("RGB")) for image in output.images])
    np.savez(name, images=images, latents=latents, tflops=output.tflops)
assert not any(name.startswith("dcdit.") for name in sys.modules)
"""


def beside(folder: Path, code: str) -> subprocess.CompletedProcess:
    """Run ``code`` in a process without dcdit and without a network, which keeps its modules in ``folder``."""
    head = BESIDE.format(threads=torch.get_num_threads(), folder=str(folder))
    environment = {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-W", "always", "-c", head + code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)


def write(folder: Path, name: str, vae: Path) -> None:
    """An export of a small network whose weights are all random, none zero."""
    network, process = NETWORKS[name]
    torch.manual_seed(0)
    spec = network | SIZES
    state = {key: tensor + 0.1 * torch.randn_like(tensor) for key, tensor in build_network(spec).state_dict().items()}
    shape = (spec["channels"], SIZES["grid"], SIZES["grid"])
    latents = LatentSpec(shape, "identity", 1.0, 0.0, ("cat", "1", "dog"))
    if name == "ddpm":
        autoencoder = load_autoencoder(str(vae), torch.device("cpu"))
        latents = LatentSpec(shape, str(vae), 0.5, 0.25, ("cat", "1", "dog"), autoencoder.fingerprint)
    weights = Weights("test", spec, latents, 3, state, None, {"diffusion": process})
    write_exported(folder, weights, "ema", "fp32", replace(CARD, pipeline=pipeline_files(weights)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_vae):
    """Exports of all kinds, and the shipped network's, in one folder."""
    folder = tmp_path_factory.mktemp("exports")
    for name in NETWORKS:
        write(folder / name, name, tiny_vae)
    shipped = read_weights(resolve_checkpoint("digits", "runs"))
    write_exported(folder / "digits", shipped, "ema", "fp32", replace(CARD, pipeline=pipeline_files(shipped)))
    return folder


def test_a_process_without_dcdit_makes_the_same_images(folders, capsys):
    same = {"num_images_per_class": 2, "num_inference_steps": 6, "guidance_scale": 2.0, "seed": 7}
    calls = {name: {"classes": CLASSES[name], **same, **values} for name, values in THEIRS.items()}
    result = beside(folders, SAMPLE.format(calls=calls))
    assert result.returncode == 0, result.stderr
    assert "might require" not in result.stderr
    for name, words in OURS.items():
        common = ("sampler.steps=6", "guidance.scale=2.0", "seed=7", "per_class=2", f"out=ours/{name}", "device=cpu")
        chosen = f"classes=[{','.join(map(str, CLASSES[name]))}]"
        said = typed(capsys, folders, "sample", f"checkpoint={name}", chosen, *words, *common)
        assert said.status == 0, said.words
        ours, theirs = np.load(folders / "ours" / name / "latents.npz"), np.load(folders / f"{name}.npz")
        assert ours["latents"].std() > 0.1
        np.testing.assert_allclose(theirs["latents"], ours["latents"], rtol=1e-3, atol=1e-3)
        picture = pictured(folders / "ours" / name / "samples.png", theirs["images"].shape[1])
        assert np.abs(picture - theirs["images"].astype(int)).max() <= 1


def pictured(path: Path, side: int) -> np.ndarray:
    """The four images (4, side, side, 3) in a picture of two columns, which enlarges them to 64 pixels or more."""
    grid = np.asarray(Image.open(path).convert("RGB")).astype(int)
    large = (grid.shape[1] - 6) // 2  # two pixels stand between images and around them
    corners = [(2 + row * (large + 2), 2 + column * (large + 2)) for row in range(2) for column in range(2)]
    factor = large // side
    return np.stack([grid[y : y + large : factor, x : x + large : factor] for y, x in corners])


MISTAKES = {
    "unknown class": ("dit", {"classes": ["bird"]}, "'bird' is neither a class name nor a label in 0..2"),
    "another process": ("flow", {"sampler": "ddim"}, "sampler=ddim does not fit a network that was trained with"),
    "no such option": ("flow", {"guidance_options": {"intervall": None}}, "did you mean interval?"),
    "no tokens to drop": ("dit", {"drop_fraction": 0.5}, "DiT/2 drops no tokens"),
    "two budgets": ("flow", {"drop_fraction": 0.5, "budget": 0.5}, "budget: drop_fraction and drop_schedule are what"),
    "another network": ("flow", {"guidance_options": {"weak_checkpoint": "x"}}, "a second network needs dcdit"),
    "a type of image": ("dit", {"output_type": "jpeg"}, "output_type='jpeg' is not one of pil"),
    "text": ("dit", {"classes": "cat"}, "classes='cat': a list is needed"),
    "no class": ("dit", {"classes": []}, "classes=[] asks for nothing: name at least one class"),
    "a seed": ("dit", {"seed": -1}, "seed=-1 is negative"),
    "no images at once": ("dit", {"batch_size": 0}, "batch_size=0 is not a positive number"),
}


@pytest.fixture
def loaded(folders, monkeypatch):
    """What loads a pipeline here, in this process."""
    from diffusers import DiffusionPipeline

    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(folders / "modules"))
    monkeypatch.syspath_prepend(str(folders / "modules"))
    return lambda name, **options: DiffusionPipeline.from_pretrained(name, trust_remote_code=True, **options)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_with_the_remedy(folders, loaded, mistake):
    name, values, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=re.escape(message)):
        loaded(str(folders / name))(**{"classes": ["cat"], "num_inference_steps": 2, **values})


def test_the_type_of_numbers_is_chosen_when_it_is_loaded(folders, loaded):
    pipeline = loaded(str(folders / "ddpm"), torch_dtype=torch.bfloat16, custom_pipeline=str(folders / "ddpm"))
    network = pipeline.transformer.network
    assert {network.backbone.blocks[0].mlp.fc1.weight.dtype, network.router.project.weight.dtype} == {
        *(torch.bfloat16, torch.float32)
    }
    half, whole = (
        each(["cat"], num_inference_steps=2, output_type="latent").images
        for each in (pipeline, loaded(str(folders / "ddpm")))
    )
    assert 0 < (half - whole).abs().max() < 0.3 * whole.std()
    with pytest.raises(ValueError, match=r"dtype=torch\.float16: this network runs in torch\.float32 or"):
        loaded(str(folders / "ddpm"), torch_dtype=torch.float16)
    assert pipeline.to("cpu").device.type == "cpu"
    with pytest.raises(ValueError, match=r"dtype=torch\.bfloat16: choose it in from_pretrained"):
        pipeline.to(torch.bfloat16)
    with pytest.raises(ValueError, match="copy the folder that the pipeline came from"):
        pipeline.save_pretrained(folders / "elsewhere")


def test_a_budget_is_met_and_a_generator_gives_the_seed(folders, loaded):
    pipeline = loaded(str(folders / "digits"))
    full = pipeline(range(10), num_inference_steps=8, sampler="ddim")
    met = pipeline(range(10), num_inference_steps=8, sampler="ddim", budget=0.8)
    assert sum(met.tflops) == pytest.approx(0.8 * sum(full.tflops), rel=0.05)
    one, other, again = (
        pipeline([3], num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(seed)).images
        for seed in (1, 2, 1)
    )
    assert (one == again).all()
    assert (one != other).any()


def test_from_the_hub_only_what_is_needed_is_fetched(folders, loaded, tmp_path, monkeypatch):
    with hub_of({"me/mine": folders / "dit"}, tmp_path) as hub:
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.address)
        images = loaded("me/mine", cache_dir=tmp_path)(["cat"], num_inference_steps=2, output_type="np").images
    asked = {Path(path).name for path in hub.asked if "/resolve/" in path}
    assert {"pipeline.py", "model.safetensors", "config.json", "model_index.json"} < asked
    assert "README.md" not in asked
    assert (images == loaded(str(folders / "dit"))(["cat"], num_inference_steps=2, output_type="np").images).all()


@pytest.mark.parametrize("kind", ["pipeline.py", "transformer/*.py"])
def test_changed_code_is_told(folders, loaded, tmp_path, capsys, kind):
    shutil.copytree(folders / "dit", tmp_path / "x")
    (file,) = (tmp_path / "x").glob(kind)
    file.write_text(file.read_text() + "# mine\n")
    with pytest.warns(UserWarning, match=rf"{file.name} is not as dcdit exported it, and it is run: read it"):
        loaded(str(tmp_path / "x"))
    said = typed(capsys, tmp_path, "sample", "checkpoint=x", "sampler.steps=2", "per_class=1", "out=images")
    assert said.status == 0
    assert f"{Path('x') / file.relative_to(tmp_path / 'x')} is not as dcdit export wrote it" in said.words
    said = typed(capsys, tmp_path, "export", "checkpoint=digits", "out=x")
    assert (said.status, file.name in said.words) == (2, True), said.words


def test_another_autoencoder_decodes_if_it_fits(folders, loaded, tiny_vae):
    from diffusers import AutoencoderKL

    same = AutoencoderKL.from_pretrained(tiny_vae)
    how = {"classes": ["cat"], "num_inference_steps": 2, "output_type": "np"}
    images = loaded(str(folders / "ddpm"), vae=same)(**how).images
    assert (images == loaded(str(folders / "ddpm"))(**how).images).all()
    with torch.no_grad():
        same.decoder.conv_out.bias += 0.2
    with pytest.warns(UserWarning, match=r"the latents are those of an autoencoder with weights \w{16}, not \w{16}"):
        assert (loaded(str(folders / "ddpm"), vae=same)(**how).images != images).any()
    with pytest.raises(ValueError, match=r"vae=AutoencoderKL: take the autoencoder of the latents"):
        loaded(str(folders / "flow"), vae=same)(**how)
    with pytest.raises(ValueError, match=r"vae=AutoencoderKL in torch\.bfloat16: take one of"):
        loaded(str(folders / "ddpm"), vae=same.to(torch.bfloat16))(**how)


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors"])
def test_damaged_folders_are_refused(folders, loaded, tmp_path, damage):
    shutil.copytree(folders / "dit", tmp_path / "x")
    content = (tmp_path / "x" / damage).read_bytes()
    (tmp_path / "x" / damage).write_bytes(content.replace(b"3", b"4") if damage[0] == "c" else content[:-4] + b"abcd")
    with pytest.raises(ValueError, match=rf"{damage} is (not as it was written|damaged)"):
        loaded(str(tmp_path / "x"))


def test_every_name_in_the_code_is_defined_and_no_package_is_needed_but_four():
    code = network_code()
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module])
    }
    packages = {"torch", "diffusers", "numpy", "safetensors", "typing_extensions"}
    assert imported - set(sys.stdlib_module_names) == packages
    whole = symtable.symtable(code, "code", "exec")
    defined = {symbol.get_name() for symbol in whole.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    missing, tables = set(), [whole]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        used = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global() and symbol.is_referenced()}
        missing |= used - defined - set(dir(builtins)) - {"__name__", "__file__"}
    assert missing == set()


def test_networks_of_plugins_have_no_pipeline(no_plugins):
    from dcdit.network import DCDiT
    from dcdit.network.routing import ROUTERS

    class Mine(ROUTERS["cosine"]):
        """A router of a plug-in."""

    ROUTERS["mine"] = Mine
    spec = {**NETWORKS["dit"][0], **SIZES}
    latents = LatentSpec((1, 8, 8), "identity", 1.0, 0.0, ("a", "b", "c"))
    ours = Weights("test", spec, latents, 3, {}, None)
    theirs = replace(ours, model={"name": "dcdit", "router": "mine", **SIZES})
    assert [bool(pipeline_files(each)) for each in (ours, theirs, replace(ours, latents=None))] == [True, False, False]
    assert DCDiT


def test_the_code_of_two_modules_with_one_name_is_kept_apart(tmp_path, monkeypatch):
    package = tmp_path / "dcdit_like"
    package.mkdir()
    (package / "one.py").write_text("_LIMIT = 1\n\ndef one() -> int:\n    return _LIMIT\n")
    (package / "two.py").write_text(
        "from dcdit_like.one import one\n\n_LIMIT = 2\n\ndef two() -> int:\n    return one() + _LIMIT\n"
    )
    (package / "three.py").write_text("from dcdit_like.two import two\n\ndef one() -> int:\n    return two()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("dcdit.sampling.bundle._PACKAGE", "dcdit_like")
    found: dict = {}
    exec(gather({"two": "dcdit_like.two"}, "A title.", {}), found)
    assert found["two"]() == 3
    with pytest.raises(AssertionError, match=r"one is in dcdit_like\.\w+ and dcdit_like\.\w+: rename one"):
        gather({"one": "dcdit_like.three"}, "A title.", {})
