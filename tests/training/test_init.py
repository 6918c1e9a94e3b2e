"""Where training starts from: weights that exist, parts that are frozen, and the blocks of a plain DiT."""

import json

import pytest
import torch
from support.configs import MODERN, MODERN_WORDS, PLAIN_DIT, TINY, compose_config, train
from support.runs import differences, load

from dcdit.checkpoints.foreign import reference_state
from dcdit.checkpoints.load import load_model
from dcdit.checks import shown
from dcdit.data.builtin import Digits
from dcdit.errors import UserError
from dcdit.network import DCDiT
from dcdit.network.packing import make_packing, make_static_packing
from dcdit.training.auxiliary import HiddenStates, Noisy, covering, record_hidden_states
from dcdit.training.callbacks import EMA
from dcdit.training.distillation import Distillation

STILL = ("optimizer.lr=1e-12", "optimizer.lr_warmup_steps=0", "trainer.max_steps=1")
UPCYCLE = ("init=upcycle", "init.distil_steps=4", "trainer.max_steps=6", "callbacks.checkpoint.every_n_steps=1")


def weights_of(run) -> tuple[str, str]:
    return "init=weights", f"init.checkpoint={run}"


@pytest.fixture
def teacher(tiny):
    """A plain DiT of a few steps."""
    return tiny("teacher", *PLAIN_DIT, "trainer.max_steps=3", "optimizer.lr=0.02")


def raw(run) -> dict:
    return {name.removeprefix("network."): value for name, value in load(run)["current_model_state"].items()}


def test_a_run_starts_from_the_weights_of_another(trained_run, tiny, capsys):
    run = tiny("tuned", *weights_of(trained_run), *STILL)
    before = load_model(trained_run).network.state_dict()
    torch.testing.assert_close(raw(run), dict(before), rtol=0, atol=1e-9)
    stored = load(run)
    assert stored["global_step"] == 1
    assert stored["hyper_parameters"]["init"]["fingerprint"]
    assert str(trained_run) not in json.dumps(stored["hyper_parameters"]["init"])
    names = json.loads((run / "init.json").read_text())
    assert (set(names["loaded"]), names["new"], names["left"]) == (set(before), [], [])
    # the average is not the first weights' for thousands of steps
    assert compose_config(*TINY, *weights_of("x")).callbacks.ema.warmup


def test_going_on_needs_the_weights_no_more(trained_run, tiny):
    places = weights_of(trained_run)
    tiny("tuned", *places, "trainer.max_steps=2")
    run = tiny("tuned", *weights_of("gone"), "trainer.max_steps=4", "ckpt_path=last")
    assert load(run)["global_step"] == 4
    assert load(run)["hyper_parameters"]["init"]["source"]
    with pytest.raises(UserError, match=r"init.name='none': the run was trained with 'weights'"):
        tiny("tuned", "trainer.max_steps=5", "ckpt_path=last", "callbacks.ema.warmup=true")


def test_what_differs_is_refused_until_it_is_asked_for(trained_run, tiny, tmp_path, caplog):
    before = load_model(trained_run).network.state_dict()
    places = weights_of(trained_run)

    def refuses(words: str, *overrides: str) -> None:
        with pytest.raises(UserError, match=words):
            tiny("refused", *places, *STILL, *overrides)

    cosine = ("model.router=cosine",)
    refuses(
        r"model.router='cosine': .* was trained with 'predictability', set .* or add init.adapt=\[router\]", *cosine
    )
    found = raw(tiny("router", *places, *STILL, *cosine, "init.adapt=[router]"))
    assert torch.allclose(found["residual.weight"], before["residual.weight"])
    names = json.loads((tmp_path / "router" / "init.json").read_text())
    assert set(names["new"]) == {"router.query.weight", "router.key.weight"}
    assert all(name.startswith("router.") for name in names["left"])

    refuses(
        r"parameter \S+ has shape \[32, 256\] there and \[64, 256\] here.*model.width is 32 there", "model.width=64"
    )
    for key, value, there in (("heads", 4, 2), ("smoothing_sigma", 2, 1), ("freq_shift", 1, 0)):
        refuses(f"model.{key}={value}: .* was trained with {there}", f"model.{key}={value}")
    for key, value in MODERN.items():
        refuses(f"model.{key}={shown(value)}: .* was trained with .*, set model.{key}=", f"model.{key}={value}")
    refuses("model.name=dcdit, model.name=dit is trained", *PLAIN_DIT)

    larger = tmp_path / "larger"
    Digits(grid=12).write(larger)
    grid = (f"data.directory={larger}", "model.grid=12")
    refuses(r"a grid of 8 there and 12 here. To adapt it, add init.adapt=\[grid\]", *grid)
    process = ("diffusion.weighting=min_snr", "model.smoothing_sigma=2")
    found = load_model(tiny("grid", *places, *STILL, *grid, *process, "init.adapt=[grid]"), "raw").network
    assert found.grid == (12, 12)
    assert "was trained with diffusion.weighting='none'" in caplog.text
    torch.testing.assert_close(found.state_dict(), before, rtol=0, atol=1e-9)


def test_other_classes_keep_the_null_class(trained_run, tiny, tmp_path, digits):
    import numpy as np

    from dcdit.data.arrays import write_shards

    images = np.random.default_rng(0).uniform(-1, 1, (16, 1, 8, 8)).astype(np.float32)
    names = ("odd", "even", "none")
    write_shards(
        *(tmp_path / "three" / "train", images, np.arange(16) % 3),
        classes=names,
        autoencoder="identity",
        scale=1.0,
        shift=0.0,
        samples_per_shard=8,
    )
    words = (*weights_of(trained_run), *STILL, f"data.directory={tmp_path / 'three'}", "model.num_classes=3")
    with pytest.raises(UserError, match=r"10 classes there and 3 here. To adapt it, add init.adapt=\[classes\]"):
        tiny("refused", *words)
    found = raw(tiny("classes", *words, "init.adapt=[classes]"))
    before = load_model(trained_run).network.state_dict()
    table = found["condition.label.table.weight"]
    assert table.shape[0] == 4
    torch.testing.assert_close(table[-1], before["condition.label.table.weight"][-1], rtol=0, atol=1e-9)
    assert (table[:3] - before["condition.label.table.weight"][:3]).abs().min(1).values.max() > 0
    # latents of another scale are other latents
    write_shards(
        *(tmp_path / "scaled" / "train", images, np.arange(16) % 10),
        classes=tuple(map(str, range(10))),
        autoencoder="identity",
        scale=0.5,
        shift=0.0,
        samples_per_shard=8,
    )
    words = (*weights_of(trained_run), *STILL, f"data.directory={tmp_path / 'scaled'}")
    with pytest.raises(UserError, match=r"other latents .*scale is 1 there and 0.5 here.*init.adapt=\[latents\]"):
        tiny("refused", *words)
    assert tiny("latents", *words, "init.adapt=[latents]")


def test_frozen_parts_stay_and_others_learn_at_their_own_rate(trained_run, tiny):
    before = load_model(trained_run).network.state_dict()
    words = (*weights_of(trained_run), "optimizer.lr=0.01", "optimizer.lr_warmup_steps=0", "trainer.max_steps=2")
    found = raw(tiny("frozen", *words, "init.freeze=[backbone,condition]", "optimizer.lr_scale={decoder: 1e-9}"))
    change = {name: float((found[name] - tensor).abs().max()) for name, tensor in before.items()}
    parts = {name: max(c for n, c in change.items() if n.startswith(f"{name}.")) for name in ("backbone", "condition")}
    assert set(parts.values()) == {0.0}
    assert 0 < max(c for name, c in change.items() if name.startswith("decoder.")) < 1e-8
    assert max(c for name, c in change.items() if name.startswith("encoder.")) > 1e-3
    with pytest.raises(UserError, match="has no part body, but condition, embed"):
        tiny("refused", *words, "init.freeze=[body]")
    with pytest.raises(UserError, match="has no part body"):
        tiny("refused", *words, "optimizer.lr_scale={body: 1}")
    parts = ",".join(load_model(trained_run).network.parts())
    with pytest.raises(UserError, match="leaves nothing to train"):
        tiny("refused", *words, f"init.freeze=[{parts}]")


def test_the_average_warms_up():
    values = torch.randn(40, 3)
    for warmup in (False, True):
        average = torch.zeros(3)
        expected = torch.zeros(3)
        update = EMA(0.9, warmup)._multi_avg_fn if hasattr(EMA(0.9, warmup), "_multi_avg_fn") else None
        update = update or EMA(0.9, warmup)._kwargs["multi_avg_fn"]
        for number, value in enumerate(values):
            update([average], [value], torch.tensor(number))
            decay = min(0.9, (1 + number) / (10 + number)) if warmup else 0.9
            expected = decay * expected + (1 - decay) * value
        torch.testing.assert_close(average, expected)


# ---- from a plain DiT ----------------------------------------------------------------------------------------------


def test_blocks_and_embedders_are_taken_over(teacher, tiny):
    run = tiny("up", *UPCYCLE, f"init.teacher={teacher}", *STILL)
    before, found = load_model(teacher).network.state_dict(), raw(run)
    for name, tensor in before.items():
        if name.startswith(("blocks.", "condition.")):
            own = f"backbone.{name}" if name.startswith("blocks.") else name
            torch.testing.assert_close(found[own], tensor, rtol=0, atol=1e-9)
    names = json.loads((run / "init.json").read_text())
    assert {name.split(".")[0] for name in names["left"]} == {"embed", "output"}
    assert {name.split(".")[0] for name in names["loaded"]} == {"condition", "backbone"}
    network = load_model(run).network
    assert network.spec["position_patch"] == 2
    assert isinstance(network.condition_norm, torch.nn.LayerNorm)
    assert not any("teacher" in name or "distil" in name for name in load(run)["state_dict"])
    # a kept position lies where its patch lies, to within half a patch
    coarse = load_model(teacher).network.pos_embed.view(4, 4, -1)
    fine = network.pos_embed.view(8, 8, -1)
    torch.testing.assert_close(fine.view(4, 2, 4, 2, -1).mean((1, 3)), coarse, rtol=0, atol=0.15)


def test_resumed_in_the_middle_of_the_distillation_it_is_the_same_run(teacher, tiny, tmp_path):
    words = (*UPCYCLE, f"init.teacher={teacher}")
    whole = tiny("whole", *words)
    tiny("parts", *words, "trainer.max_steps=2", "optimizer.schedule=constant")
    again = tiny("whole2", *words, "optimizer.schedule=constant")
    parts = tiny("parts", *words, "optimizer.schedule=constant", "ckpt_path=last")
    for key in ("state_dict", "current_model_state", "optimizer_states", "LatentDataModule"):
        assert differences(load(again)[key], load(parts)[key]) == []
    assert differences(load(again)["state_dict"], load(whole)["state_dict"]) != []
    log = (whole / "logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = log[0].split(",").index("train/distil_loss")
    assert [bool(line.split(",")[column]) for line in log[1:]] == [True] * 4 + [False] * 2
    other = tiny("other", *PLAIN_DIT, "trainer.max_steps=1", "optimizer.lr=0.02", "optimizer.lr_warmup_steps=0")
    tiny("half", *words, "trainer.max_steps=2")
    with pytest.raises(UserError, match=r"the run was started from .* Name the same, or start another run"):
        tiny("half", *UPCYCLE, f"init.teacher={other}", "ckpt_path=last")
    assert tiny("half", *UPCYCLE, f"init.teacher={teacher}", "ckpt_path=last")


def test_a_teacher_that_does_not_fit_is_refused_with_both_values(teacher, trained_run, tiny):
    def refuses(words: str, *overrides: str, place=teacher) -> None:
        with pytest.raises(UserError, match=words):
            tiny("refused", *UPCYCLE, f"init.teacher={place}", *overrides)

    refuses(r"model.width=64 does not fit .* whose width is 32", "model.width=64")
    refuses(r"model.depth=2 does not fit .* whose depth is 1", "model.depth=2")
    refuses(r"model.freq_shift=1 does not fit .* whose freq_shift is 0", "model.freq_shift=1")
    refuses(r"model.time_input='unit' does not fit .* whose time_input is 'steps': set", "model.time_input=unit")
    refuses(r"trained with diffusion=ddpm.* take diffusion=ddpm, or init.distil_steps=0$", "diffusion=flow")
    refuses(r"model.position_patch=1: .* has patches of 2", "model.position_patch=1")
    refuses("holds no plain DiT, which upcycling starts from", place=trained_run)
    refuses("does not exist", place="nowhere")
    state, latents = reference_state(load_model(teacher).network), load_model(teacher).latents
    state["y_embedder.embedding_table.weight"] = state["y_embedder.embedding_table.weight"][:-1]
    torch.save(state, tiny.folder / "no_null_class.pt")
    said = {"heads": 2, "num_classes": 10, "autoencoder": "identity", "scale": latents.scale, "shift": latents.shift}
    refuses(r"no shape tells the heads: give init\.assume\.heads", place=tiny.folder / "no_null_class.pt")
    refuses(
        r"model.label_dropout=0.1: .* was trained without a null class",
        *(f"init.assume.{key}={value}" for key, value in said.items()),
        place=tiny.folder / "no_null_class.pt",
    )
    with pytest.raises(UserError, match="init=upcycle makes a DC-DiT of a plain DiT: choose a dcdit model"):
        train(compose_config(*TINY, *UPCYCLE, "init.teacher=x", *PLAIN_DIT), tiny.folder)


def test_a_teacher_of_sit_and_its_student_embed_one_time(teacher, tiny):
    """SiT's weights as a teacher: the student is told its convention of time, and starts with its condition."""
    latents = load_model(teacher).latents
    torch.save(reference_state(load_model(teacher).network), tiny.folder / "sit.pt")
    said = {"heads": 2, "num_classes": 10, "autoencoder": "identity", "scale": latents.scale, "shift": latents.shift}
    words = (*UPCYCLE, f"init.teacher={tiny.folder}/sit.pt", "diffusion=flow", "model.label_dropout=0.1", *STILL)
    words += tuple(f"init.assume.{key}={value}" for key, value in said.items())
    with pytest.raises(UserError, match=r"was trained with diffusion=ddpm.* init\.assume\.diffusion=\.\.\. says so"):
        tiny("refused", *words)
    sit = (*words, "init.assume.diffusion=flow_sit")
    with pytest.raises(UserError, match=r"time_input='steps' does not fit .* set model\.time_input='reversed'"):
        tiny("refused", *sit)
    run = tiny("up", *sit, "model.time_input=reversed")
    student = load_model(run)
    assert (student.process.settings.name, student.network.spec["time_input"]) == ("flow", "reversed")
    t, y = torch.tensor([0.0, 250.0, 1000.0]), torch.tensor([0, 4, 10])
    theirs = load_model(teacher).network.condition(1 - t / 1000, y)  # as SiT's own code asks it
    torch.testing.assert_close(student.network.condition(t, y), theirs, rtol=0, atol=1e-5)
    again = tiny("tuned", *weights_of(run), "diffusion=flow", "model.time_input=reversed", "model.position_patch=2",
                 "model.condition_norm=true", *STILL)  # fmt: skip
    assert load_model(again).network.spec["time_input"] == "reversed"
    with pytest.raises(
        UserError, match=r"model\.time_input='steps': .* was trained with 'reversed', set model\.time_input"
    ):
        tiny("refused", *weights_of(run), "diffusion=flow", "model.position_patch=2", "model.condition_norm=true")


def test_a_teacher_of_other_blocks_hands_over_those_and_the_scale_of_its_rotations(tiny):
    teacher = tiny("teacher", *PLAIN_DIT, *MODERN_WORDS, "trainer.max_steps=2", "optimizer.lr=0.02")
    words = (*UPCYCLE, f"init.teacher={teacher}", *STILL)
    published = {"norm": "layer", "mlp": "gelu", "position": "table", "qk_norm": False}
    for key, value in published.items():
        message = f"model.{key}={shown(value)} does not fit .* whose {key} is {shown(MODERN[key])}: set"
        with pytest.raises(UserError, match=message):
            tiny("refused", *words, *MODERN_WORDS, f"model.{key}={value}")
    run = tiny("up", *words, *MODERN_WORDS)
    before, found = load_model(teacher).network, raw(run)
    taken = {name: tensor for name, tensor in before.state_dict().items() if name.startswith("blocks.")}
    assert len(taken) == 12
    for name, tensor in taken.items():
        torch.testing.assert_close(found[f"backbone.{name}"], tensor, rtol=0, atol=1e-9)
    fine, coarse = (torch.view_as_complex(each.rotary.table) for each in (load_model(run).network, before))
    corners = fine.view(4, 2, 4, 2, -1).permute(0, 2, 1, 3, 4).flatten(2, 3)
    torch.testing.assert_close(corners.prod(dim=2), coarse.view(4, 4, -1) ** 4)


def test_each_kept_position_meets_the_token_that_covers_it(teacher):
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[0, 0, 0] = mask[0, 3, 5] = mask[1, 7, 7] = mask[1, 6, 1] = True
    index = make_packing(mask.flatten(1)).index
    assert covering(index, (8, 8), 2).tolist() == [0, 1 * 4 + 2, 16 + 3 * 4 + 0, 16 + 3 * 4 + 3]


@torch.no_grad()
def test_the_loss_is_zero_at_the_teachers_own_states_and_one_at_none(teacher):
    network = load_model(teacher).network
    x, t, y = torch.randn(3, 1, 8, 8), torch.tensor([0, 400, 999]), torch.tensor([0, 4, 10])
    packing = make_packing(torch.rand(3, 64).sort(1).values > 0.5)
    with record_hidden_states(network) as wanted:
        network(x, t, y)
    assert len(wanted.tokens) == 2
    tokens = covering(packing.index, network.grid, network.patch)
    noisy = Noisy(x, t, y, x, x)
    own = HiddenStates({number: each[tokens] for number, each in wanted.tokens.items()}, packing)
    match = Distillation(network, 10, 2.0, True)
    assert match.loss(own, noisy, None).item() == 0
    padded = make_static_packing(torch.rand(3, 64) > 0.5, 150)
    half = {
        number: 0.5 * each[covering(padded.index, network.grid, network.patch)]
        for number, each in wanted.tokens.items()
    }
    for each in half.values():
        each[~padded.valid] = 1e6
    assert match.loss(HiddenStates(half, padded), noisy, None).item() < 1  # padding counts for nothing
    everything = make_packing(torch.ones(3, 64, dtype=torch.bool))
    nothing = HiddenStates(dict.fromkeys(range(2), torch.zeros(len(everything.index), 32)), everything)
    assert match.loss(nothing, noisy, None).item() == pytest.approx(1, rel=1e-5)
    assert [match.weight_at(step) for step in (0, 5, 10, 11)] == [2.0, 1.0, 0.0, 0.0]
    assert Distillation(network, 10, 2.0, False).weight_at(9) == 2.0


def test_the_student_learns_to_have_the_teachers_states(teacher, tiny):
    run = tiny(
        "long",
        "init=upcycle",
        f"init.teacher={teacher}",
        "init.distil_steps=60",
        "init.distil_decay=false",
        "trainer.max_steps=60",
        "optimizer.lr=5e-3",
    )
    rows = (run / "logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train/distil_loss")
    losses = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_networks_are_functions_of_their_input_alone():
    network = DCDiT(8, 1, 3, width=32, depth=1, heads=2, encoder_width=16, groups=8).train()
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 2])
    assert torch.equal(network(x, t, y).routing.prob, network(x, t, y).routing.prob)
