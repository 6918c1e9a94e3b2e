"""Weights of other programs: what they are is told by their names and shapes, and nothing in them is run."""

import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.foreign import MINI, diffusers_dit, mini_state, small_dit, write_reference

from dcdit import DCDiT
from dcdit.checkpoints.export import Card, write_exported
from dcdit.checkpoints.foreign import imagenet_classes, reference_state
from dcdit.checkpoints.load import Model, load_model, read_weights
from dcdit.checkpoints.names import NAME_MAPS
from dcdit.checkpoints.resolve import resolve_checkpoint
from dcdit.checkpoints.settings import AssumeSettings
from dcdit.data.latents import IDENTITY, LatentSpec
from dcdit.diffusion.settings import DDPM, GuidanceSettings
from dcdit.errors import UserError
from dcdit.network import build_network
from dcdit.sampling.guiding import check_guidance
from dcdit.settings.compose import model_config

HEADS = AssumeSettings(heads=4)


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@torch.no_grad()
def test_a_reference_checkpoint_gives_the_references_numbers_and_runs_no_pickle(tmp_path):
    path = write_reference(tmp_path / "0700000.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    model = load_model(path, assume=HEADS)
    with np.load(MINI / "io_in8.npz") as golden:
        x, t, y = (torch.from_numpy(golden[f"in/{name}"]) for name in ("x", "t", "y"))
        expected = torch.from_numpy(golden["a_drop0/out"])
    torch.testing.assert_close(model.network(x, t.long(), y.long()).prediction, expected, rtol=0, atol=2e-5)
    assert (model.network.grid, model.network.channels, model.network.num_classes) == ((8, 8), 4, 4)
    assert not model.network.training
    assert model.step == 700  # what Adam has counted, not what the file is called
    assert (model.latents.autoencoder, model.latents.scale) == ("stabilityai/sd-vae-ft-ema", 0.18215)
    raw = load_model(path, "raw", assume=HEADS).network
    assert torch.equal(raw.residual.weight, model.network.residual.weight + 1)


def test_a_hostile_file_is_refused_and_runs_nothing(tmp_path):
    marker, path = tmp_path / "exploded", tmp_path / "hostile.pt"
    torch.save({"ema": {}, "config": Bomb(marker)}, path)
    with pytest.raises(UserError, match=r"it asks to run posix\.system"):
        load_model(path, assume=HEADS)
    assert not marker.exists()


def refuses(path: Path, words: str, assume: AssumeSettings = HEADS) -> None:
    with pytest.raises(UserError, match=words) as caught:
        load_model(path, assume=assume)
    assert path.name in str(caught.value)


def test_what_does_not_fit_is_told_with_the_first_differences(tmp_path):
    path, state = tmp_path / "odd.pt", mini_state()

    def saved(**changes) -> Path:
        torch.save({key: value for key, value in {**state, **changes}.items() if value is not None}, path)
        return path

    refuses(saved(), "assume.heads=", AssumeSettings())
    refuses(saved(), "heads=7 does not divide", AssumeSettings(heads=7))
    refuses(saved(**{"surprise.weight": torch.zeros(1)}), "Nearest is a reference DC-DiT.* surprise.weight is unknown")
    refuses(
        saved(**{"hnet.residual_proj.weight": None, "hnet.residual_proj.bias": None}), "hnet.residual_proj is missing"
    )
    refuses(saved(**{"final_layer.linear.bias": None}), r"final_layer.linear.bias has shape none instead of \[8\]")
    refuses(saved(**{"final_layer.linear.bias": torch.zeros(7)}), r"1 differ: final_layer.linear.bias has shape \[7\]")
    flat = {"y_embedder.embedding_table.weight": torch.zeros(5)}
    refuses(saved(**flat), "y_embedder.embedding_table.weight is not a tensor of 2 dimensions")
    refuses(saved(**{"x_embedder.proj.weight": None}), "x_embedder.proj.weight is not a tensor of 4 dimensions")
    refuses(saved(pos_embed=None), "has a table pos_embed")
    refuses(saved(pos_embed=state["pos_embed"] + 0.1), "is not the fixed sin-cos table")
    refuses(saved(**{"x_embedder.proj.weight": torch.full((64, 4, 3, 3), torch.nan)}), "is not finite")
    names = {f"layer.{number}.weight": torch.zeros(2, 2) for number in range(9)}
    torch.save(names, path)
    refuses(path, r"of no network that is known here. Nearest is a .*: (?:[^,]*, ){4}[^,]*$")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    refuses(tmp_path / "text.pt", "cannot be read safely")


def test_what_the_file_does_not_say_can_be_said(tmp_path):
    path = write_reference(tmp_path / "x.pt")
    said = AssumeSettings(heads=4, smoothing_sigma=0, autoencoder="identity")
    model = load_model(path, assume=said)
    assert model.network.smoothing_sigma is None
    assert (model.latents.autoencoder, model.latents.scale) == ("identity", 1.0)
    assert read_weights(resolve_checkpoint(str(path), "runs"), AssumeSettings(heads=4, scale=0.5)).latents.scale == 0.5


def test_a_checkpoint_of_ours_says_everything_itself(trained_run):
    with pytest.raises(UserError, match=r"assume.heads=4: this checkpoint of dcdit.train says itself"):
        load_model(trained_run, assume=HEADS)


@torch.no_grad()
def test_dit_names_and_a_folder_of_diffusers(tmp_path):
    network = small_dit()
    torch.save(reference_state(network), tmp_path / "dit.pt")
    save_file(reference_state(network), tmp_path / "dit.safetensors")
    theirs = diffusers_dit()
    theirs.save_pretrained(tmp_path / "folder")
    theirs.save_pretrained(tmp_path / "pipeline" / "transformer", max_shard_size="200KB")
    assert len(list((tmp_path / "pipeline" / "transformer").glob("*.safetensors"))) > 1
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([1, 5, 10])
    for name in ("dit.pt", "dit.safetensors"):
        found = load_model(tmp_path / name, assume=HEADS)
        torch.testing.assert_close(found.network.state_dict(), network.state_dict(), rtol=0, atol=0)
        assert found.network.spec == network.spec
        assert found.step is None
    expected = theirs(x, timestep=t, class_labels=y).sample
    for name in ("folder", "pipeline"):
        found = load_model(tmp_path / name)  # its configuration tells the heads
        torch.testing.assert_close(found.network(x, t, y).prediction, expected, rtol=0, atol=2e-5)
    with pytest.raises(UserError, match=r"assume.heads=3: its configuration says 4"):
        load_model(tmp_path / "folder", assume=AssumeSettings(heads=3))
    with pytest.raises(UserError, match="give their folder"):
        load_model(tmp_path / "folder" / "diffusion_pytorch_model.safetensors")
    assert load_model(tmp_path / "folder", assume=AssumeSettings(freq_shift=0)).network.spec["freq_shift"] == 0
    with pytest.raises(UserError, match=r"weights=raw: this DiT checkpoint holds weights=ema alone"):
        load_model(tmp_path / "dit.pt", "raw", assume=HEADS)


def test_a_network_of_diffusers_that_is_no_dit_of_ours_is_refused(tmp_path):
    odd = diffusers_dit()
    with torch.no_grad():
        odd.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight += 1
    odd.save_pretrained(tmp_path / "embedders")
    refuses(tmp_path / "embedders", "transformer_blocks.1.norm1.emb.* differs from that of block 0")
    for key, value in (
        ("activation_fn", "geglu"),
        ("out_channels", 4),
        ("num_embeds_ada_norm", 7),
        ("_class_name", "UNet2DModel"),
    ):
        folder = tmp_path / key
        diffusers_dit().save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        refuses(folder, f"{key}=")
    folder = tmp_path / "cut"
    diffusers_dit().save_pretrained(folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refuses(folder, "is damaged")


def test_the_names_of_a_published_network():
    wanted = json.loads((MINI.parent / "reference_names_S_256.json").read_text())
    shapes = {name: each["shape"] for name, each in wanted.items()}
    found = reference_state(build_network(model_config("dcdit_s")))
    assert {name: list(tensor.shape) for name, tensor in found.items()} == shapes


@pytest.mark.parametrize("kind", NAME_MAPS, ids=lambda kind: kind.title)
def test_names_go_both_ways(kind):
    for ours, theirs in kind.modules.items():
        own, other = (f"{name.replace('#', '1')}.bias" for name in (ours, theirs))
        assert (kind.ours(other), kind.theirs(own)) == (own, other)
    assert kind.ours("surprise.weight") is None


def test_positions_on_the_scale_of_patches_are_told_from_others(tmp_path):
    network = DCDiT(grid=8, channels=4, num_classes=3, width=128, depth=1, heads=4, encoder_width=64, position_patch=2)
    torch.save(reference_state(network), tmp_path / "upcycled.pt")
    found = load_model(tmp_path / "upcycled.pt", assume=HEADS).network
    assert torch.equal(found.pos_embed, network.pos_embed)


def test_imagenet_has_its_usual_classes():
    names = imagenet_classes()
    assert (len(names), names[0], names[207]) == (1000, "n01440764", "n02099601")
    assert list(names) == sorted(names)


WRAPPED = {
    "plain": [("^", "")],
    "DDP": [("^", "module.")],
    "compiled": [("^", "_orig_mod.")],
    "compiled, then DDP": [("^", "module._orig_mod.")],
    "compiled block by block": [(r"\.(attn|mlp)\.", r"._orig_mod.\1.")],
    "FSDP and checkpointing": [("^", "_fsdp_wrapped_module."), (r"\.attn\.", "._checkpoint_wrapped_module.attn.")],
}


@pytest.mark.parametrize(
    ("wrapped", "dtype"), zip(WRAPPED, 2 * [torch.bfloat16, torch.float16, torch.float64], strict=True), ids=str
)
def test_weights_of_any_precision_in_any_wrapper(tmp_path, dtype, wrapped):
    network = small_dit(depth=1)
    for kind, state in (("dit", reference_state(network)), ("dcdit", mini_state())):
        for pattern, wrapper in WRAPPED[wrapped]:
            state = {re.sub(pattern, wrapper, name): tensor.to(dtype) for name, tensor in state.items()}
        torch.save({**state, "n_averaged": torch.tensor(3)}, tmp_path / "x.pt")
        save_file(state, tmp_path / "x.safetensors")
        for path in (tmp_path / "x.pt", tmp_path / "x.safetensors"):
            found = load_model(path, assume=HEADS).network
            assert (found.spec["name"], found.grid, next(found.parameters()).dtype) == (kind, (8, 8), torch.float32)
            if kind == "dit":
                expected = {name: tensor.to(dtype).float() for name, tensor in network.state_dict().items()}
                torch.testing.assert_close(dict(found.state_dict()), expected, rtol=0, atol=0)


def test_one_parameter_under_two_names_is_refused(tmp_path):
    state = mini_state()
    torch.save({**state, "module.hnet.residual_proj.bias": state["hnet.residual_proj.bias"]}, tmp_path / "two.pt")
    refuses(tmp_path / "two.pt", r"module\.hnet\.residual_proj\.bias stands beside another")


def test_another_table_of_positions_is_refused_in_half_precision_too(tmp_path):
    state = mini_state()
    state["pos_embed"] = (state["pos_embed"] + 0.05).bfloat16()
    torch.save(state, tmp_path / "odd.pt")
    refuses(tmp_path / "odd.pt", "is not the fixed sin-cos table")


def test_learned_and_rotary_positions_are_refused(tmp_path):
    state = reference_state(small_dit(depth=1))
    for changes, words in (
        ({"pos_embed": torch.randn_like(state["pos_embed"])}, "weights with learned positions are not read"),
        ({"feat_rope.freqs_cos": torch.randn(4, 4)}, r"feat_rope\.freqs_cos is unknown"),
        ({"pos_embed": None}, "Weights with rotary positions are not read"),
    ):
        changed = {name: tensor for name, tensor in {**state, **changes}.items() if tensor is not None}
        torch.save(changed, tmp_path / "x.pt")
        refuses(tmp_path / "x.pt", words)


def tiny_dit_file(path: Path, **changes) -> Path:
    torch.save(reference_state(small_dit(width=8, depth=1, heads=2, grid=4, **changes)), path)
    return path


@pytest.mark.parametrize(
    ("rows", "said", "classes", "has_null_class", "remark"),
    [
        (1001, None, 1000, True, False),
        (1000, None, 1000, False, True),
        (1000, 999, 999, True, False),
        (1000, 1000, 1000, False, False),
        (11, None, 10, True, True),
        (11, 11, 11, False, False),
    ],
)
def test_classes_of_a_label_table(tmp_path, caplog, rows, said, classes, has_null_class, remark):
    path = tiny_dit_file(tmp_path / "x.pt", num_classes=rows - 1)
    model = load_model(path, assume=AssumeSettings(heads=2, num_classes=said))
    network = model.network
    assert (network.num_classes, len(model.latents.classes), network.null_class) == (classes, classes, classes)
    assert (network.label_dropout > 0) == has_null_class
    assert (f"label table of {rows} rows is taken for {classes} classes" in caplog.text) == remark
    assert len(network.condition.label.table.weight) == classes + 1
    model = Model(network, LatentSpec((4, *network.grid), IDENTITY, 1.0, 0.0, ("a",)), None)
    if has_null_class:
        check_guidance(model, GuidanceSettings(scale=2.0))
    else:
        with pytest.raises(UserError, match=r"guidance.scale=2.* without a null class"):
            check_guidance(model, GuidanceSettings(scale=2.0))
    check_guidance(model, GuidanceSettings(scale=1.0))
    again = tmp_path / "again.pt"
    torch.save(reference_state(network), again)  # a null class that means nothing is not handed on
    assert len(torch.load(again)["y_embedder.embedding_table.weight"]) == rows
    refuses(path, "but the label table has", AssumeSettings(heads=2, num_classes=7))


@pytest.mark.parametrize("variance", [True, False])
def test_the_process_that_no_shape_tells_can_be_said(tmp_path, caplog, variance):
    path = tiny_dit_file(tmp_path / "x.pt", variance=variance)
    if variance:
        assert load_model(path, assume=AssumeSettings(heads=2)).process.settings.name == "ddpm"
        assert "diffusion=ddpm is taken" in caplog.text
        assert "SiT" in caplog.text
    else:
        refuses(path, "predicts no variance.* assume.diffusion=flow", AssumeSettings(heads=2))
        refuses(path, "predicts no variance", AssumeSettings(heads=2, diffusion="ddpm"))
    caplog.clear()
    said = AssumeSettings(heads=2, diffusion="flow")
    model = load_model(path, assume=said)
    assert (model.process.settings.name, model.network.variance) == ("flow", variance)
    assert "diffusion" not in caplog.text
    with pytest.raises(UserError, match=r"sampler=ddpm does not fit"):
        DDPM(steps=2).for_process(model.process.settings)
    found = read_weights(resolve_checkpoint(str(path), "runs"), said)
    write_exported(tmp_path / "out", found, "ema", "fp32", Card("none", "", [], ""))
    assert load_model(tmp_path / "out").process.settings.name == "flow"
    with pytest.raises(UserError, match="diffusion='sit' is not one of ddpm, flow, flow_sit, flow_repa"):
        AssumeSettings(diffusion="sit")


def test_a_scale_of_latents_that_nobody_said_is_told(tmp_path, caplog):
    path = tiny_dit_file(tmp_path / "x.pt")
    for told, said in (
        (False, AssumeSettings(heads=2)),
        (False, AssumeSettings(heads=2, autoencoder="identity")),
        (False, AssumeSettings(heads=2, autoencoder="other/vae", scale=0.36)),
        (True, AssumeSettings(heads=2, autoencoder="other/vae")),
    ):
        caplog.clear()
        load_model(path, assume=said)
        assert ("the scale of the latents of other/vae: 0.18215 is taken" in caplog.text) == told
