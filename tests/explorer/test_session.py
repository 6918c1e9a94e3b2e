"""What the explorer samples: the very images of the commands, at the cost that they have."""

from dataclasses import replace

import numpy as np
import pytest
from support.configs import PLAIN_DIT, check, compose_config

from dcdit import explore
from dcdit.checkpoints.resolve import resolve_checkpoint
from dcdit.checks import to_plain
from dcdit.errors import UserError
from dcdit.explorer.choice import Choice
from dcdit.explorer.session import STRIP, Session, StoppedError, difference

CHOICE = Choice(label=3, seed=5, sampler="ddim", steps=6, scale=2.0)


def session_of(*checkpoints, most_steps=50):
    config = check(explore, compose_config(f"checkpoint={checkpoints[0]}", name="explore"))
    return Session(config, [resolve_checkpoint(str(checkpoint), "runs") for checkpoint in checkpoints], most_steps)


def quiet(done, steps, what):
    pass


@pytest.fixture(scope="module")
def session():
    return session_of("digits")


def test_costs_stand_beside_the_full_budget(session):
    full = session.generate(0, CHOICE, quiet)
    assert full.full is None
    assert full.lost == 0
    half = session.generate(0, replace(CHOICE, drop=0.5), quiet)
    assert np.array_equal(half.full.image, full.image)
    assert half.full.flops == full.flops == pytest.approx(sum(full.step_flops))
    assert half.flops < full.flops
    assert half.lost == pytest.approx(difference(half.image, full.image).mean() / 255)
    assert max(one / two for one, two in zip(half.tokens, full.tokens, strict=True)) < 1
    assert half.drops == [0.5] * 6
    again = session.generate(0, replace(CHOICE, drop=0.5, seed=6), quiet)
    assert len(again.times) == len(half.times) == 2  # the median is that of all images with these settings
    assert half.full.times is again.full.times
    assert half.kept == pytest.approx(sum(half.tokens) / 6, rel=0.2)  # both branches of guidance


@pytest.mark.parametrize(
    "changes",
    [
        {"meet": "schedule", "drop": 0.6, "drop_last": 0.1},
        {"meet": "fraction", "fraction": 0.8},
        {"cache": 0.3},
        {"guiding_drop": 0.9},
        {"sampler": "dpm++"},
        {"scale": 1.0},
    ],
)
def test_every_choice_is_what_a_command_can_say(session, changes):
    choice = replace(CHOICE, **changes)
    generated = session.generate(0, choice, quiet)
    assert generated.flops < 1.2 * session.generate(0, CHOICE, quiet).flops
    words = session.command(0, choice, "x")
    assert "out=x" in words
    for expected in {
        "schedule": ["guidance.drop_schedule=[[1000,0.6],[0,0.1]]"],
        "fraction": ["budget.fraction=0.8", "budget.by=both"],
    }.get(choice.meet, [f"sampler={choice.sampler}", "sampler.steps=6", "seed=5", "classes=[3]"]):
        assert expected in words.replace("'", "")
    if choice.meet == "schedule":
        assert generated.drops[0] > 0.5
        assert generated.drops[-1] == pytest.approx(0.1, abs=0.01)
    if choice.meet == "fraction":
        assert generated.flops == pytest.approx(0.8 * generated.full.flops, rel=0.1)
    if choice.cache:
        assert 0 in generated.tokens


def test_what_cannot_be_is_told(session):
    for changes, message in (
        ({"label": 10}, "class 10: pretrained_digits knows the classes 0 to 9"),
        ({"steps": 51}, "the page takes at most 50"),
        ({"steps": 5000}, "steps=5000 is outside"),
        ({"sampler": "euler"}, "sampler=euler does not fit"),
        ({"sampler": "best"}, "is not one of"),
        ({"scale": 50.0}, r"scale=50 is outside \[0, 20\]"),
        ({"drop": 1.1}, r"drop=1.1 is outside"),
        ({"drop": 1.0}, "guidance.drop_fraction=1: .* for which this network was not trained"),
        ({"weak": "path"}, "guidance.weak=path: .* for which this network was not trained"),
        ({"meet": "tflops", "tflops": 3.0}, "budget.tflops=3 cannot be met"),
        ({"seed": -1}, "seed=-1 is"),
    ):
        with pytest.raises(UserError, match=message):
            session.generate(0, replace(CHOICE, **changes), quiet)


def test_a_job_ends_where_it_is_told_to(session):
    seen = []

    def stop(done, steps, what):
        seen.append(done)
        if done == 3:
            raise StoppedError

    with pytest.raises(StoppedError):
        session.generate(0, replace(CHOICE, seed=99), stop)
    assert seen == [1, 2, 3]
    assert session.generate(0, replace(CHOICE, seed=99), quiet).image.shape == (16, 16, 1)


def test_a_usual_budget_can_be_met(session):
    """What the field begins with is a budget of the network at hand."""
    usual = session.usual_tflops(0)
    choice = replace(CHOICE, meet="tflops", tflops=usual, steps=20, scale=3.0)
    assert session.generate(0, choice, quiet).flops == pytest.approx(usual * 1e12, rel=0.1)


def test_seven_budgets_in_one_strip(session):
    strip = session.strip(0, replace(CHOICE, meet="fraction", fraction=0.9), quiet)
    costs = [float(words.rpartition(", ")[2].removesuffix(" GFLOPs")) for words, _ in strip]
    assert costs == sorted(costs, reverse=True)
    assert len(strip) == len(STRIP) == 7
    assert all(picture.shape == (256, 256, 3) for _, picture in strip)


def test_what_is_remembered_is_bounded(session):
    for seed in range(70):
        session._full.get(seed, lambda seed=seed: seed)
    assert len(session._full._known) == 8
    assert session._full.get(69, lambda: None) == 69


def test_two_checkpoints_beside_each_other(tiny, capsys):
    routed, plain = tiny("routed", "trainer.max_steps=2"), tiny("plain", "trainer.max_steps=2", *PLAIN_DIT)
    both = session_of(routed, plain)
    assert [both.routes(side) for side in (0, 1)] == [True, False]
    one, two = (both.generate(side, replace(CHOICE, scale=1.0), quiet) for side in (0, 1))
    assert one.image.shape == two.image.shape == (8, 8, 1)
    assert two.tokens == []
    with pytest.raises(UserError, match="has one budget: its network drops no tokens"):
        both.strip(1, CHOICE, quiet)
    with pytest.raises(UserError, match="DiT/2 drops no tokens"):
        both.generate(1, replace(CHOICE, drop=0.5), quiet)
    with pytest.raises(UserError, match="an image of 16 x 16 pixels cannot be compared with one of 8 x 8"):
        difference(np.zeros((16, 16, 1), np.uint8), one.image)


def test_a_flow_network(tiny):
    run = tiny("flow", "diffusion=flow", "trainer.max_steps=2")
    session = session_of(run)
    assert session.samplers(0) == ["euler", "heun", "sde"]
    assert session.sampler(0) == "euler"
    generated = session.generate(0, replace(CHOICE, sampler="heun", drop=0.3), quiet)
    assert len(generated.moments) == 11
    assert generated.moments[0].timestep == 1000


def test_guidance_without_backbone_is_offered_once_it_was_trained(tiny):
    path_drop = "multi_budget.path_drop=0.5"  # which begins after step 2
    early, late = (tiny(f"steps_{steps}", path_drop, f"trainer.max_steps={steps}") for steps in (2, 3))
    assert [session_of(str(run)).drops_path for run in (early, late)] == [False, True]


def test_what_the_command_said_of_a_sampler_holds():
    config = compose_config("sampler=euler", "sampler.shift=3", "sampler.clip=true", name="explore")
    base = to_plain(check(explore, config))
    euler, heun = (replace(CHOICE, sampler=name) for name in ("euler", "heun"))
    assert (euler.config(base).sampler.shift, heun.config(base).sampler.shift) == (3.0, None)
    assert "sampler.shift=3 sampler.clip=true" in euler.command(base, "x", "y")
    assert "shift" not in heun.command(base, "x", "y")


def test_mistakes_before_anything_is_loaded():
    for words, message in (
        (["budget.fraction=0.5"], "are what the page chooses: leave them out"),
        (["capacity=0.5"], "capacity=0.5: it bounds the tokens of a batch"),
        (["capacity=auto"], "capacity=auto: it bounds the tokens of a batch"),
        (["guidance.drop_fraction=0.5"], "are what the page chooses: leave them out"),
        (["guidance.uncond_drop_fraction=0.5"], "are what the page chooses: leave them out"),
        (["port=0"], "port=0 is outside"),
        (["host=a b"], "is not an address"),
        (["most_steps=2000"], "most_steps=2000 is outside"),
    ):
        with pytest.raises(UserError, match=message):
            check(explore, compose_config(*words, name="explore"))
