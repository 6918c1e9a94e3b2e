"""Training with a packed sequence of fixed length: ``execution.capacity``."""

import pytest
from support.configs import PLAIN_DIT, TINY, config_of, module_of
from support.runs import assert_same_end, logged

from dcdit.errors import UserError
from dcdit.network import NETWORKS, DCDiT
from dcdit.network.packing import static_size
from dcdit.network.routing import PredictabilityRouter


def of(run, name):
    return [float(value) for (_, key), value in sorted(logged(run).items()) if key == f"train/{name}"]


def test_no_step_has_more_tokens_than_there_is_room_for_and_what_was_dropped_is_logged(tiny, monkeypatch):
    monkeypatch.setattr(PredictabilityRouter, "BIAS", 1.0)  # a fresh router that keeps nearly all
    free = tiny("free", "trainer.max_steps=4")
    assert of(free, "dropped_by_capacity") == []
    tokens = of(free, "tokens_per_rank")
    assert len(tokens) == 4
    room = static_size(0.25, 8, 64)
    assert min(tokens) > room
    run = tiny("bounded", "trainer.max_steps=4", "execution.capacity=0.25")
    assert max(of(run, "tokens_per_rank")) == room
    dropped = of(run, "dropped_by_capacity")
    assert min(dropped) >= 0
    assert max(dropped) > 0
    assert of(run, "keep_ratio")[0] == of(free, "keep_ratio")[0], (
        "the router's own ratio, which the loss sees, is untouched"
    )


def test_a_run_with_capacity_resumes_bit_for_bit(tiny):
    whole = tiny("whole", "trainer.max_steps=4", "execution.capacity=0.3")
    tiny("parts", "trainer.max_steps=2", "execution.capacity=0.3")
    parts = tiny("parts", "trainer.max_steps=4", "execution.capacity=0.3", "ckpt_path=last")
    assert_same_end(whole, parts)


def test_auto_has_room_for_half_as_much_again_as_the_ratio_loss_asks_for():
    assert config_of("execution.capacity=auto", "compression=4").capacity == 0.375
    assert config_of("execution.capacity=auto", "compression=1.2").capacity == 1
    curriculum = ("ratio.curriculum_start=2", "ratio.curriculum_steps=10")
    assert config_of("execution.capacity=auto", "compression=4", *curriculum).capacity == 0.75
    assert config_of("execution.capacity=0.4").capacity == 0.4
    assert config_of().capacity is None


def test_a_plain_dit_has_no_capacity(tiny, caplog):
    tiny("plain", *PLAIN_DIT, "trainer.max_steps=1", "execution.capacity=auto")
    assert "execution.capacity=auto changes nothing: DiT" in caplog.text
    with pytest.raises(UserError, match=r"execution\.capacity=0\.4: DiT.* drops no tokens"):
        tiny("refused", *PLAIN_DIT, "trainer.max_steps=1", "execution.capacity=0.4")


@pytest.mark.parametrize("value", ["0", "1.5", "much"])
def test_what_is_no_share_is_refused(value):
    with pytest.raises(UserError, match=rf"execution\.capacity='?{value}'? "):
        config_of(f"execution.capacity={value}")


def test_a_network_of_ones_own_that_takes_no_capacity_is_told_so(monkeypatch):
    class Own(DCDiT):
        def forward(self, x, t, y, drop_fraction=0.0, cache=None):
            return super().forward(x, t, y, drop_fraction, cache)

    monkeypatch.setitem(NETWORKS._entries, "dcdit", Own)
    with pytest.raises(UserError, match=r"execution\.capacity=auto: Own\.forward takes no capacity: add the argument"):
        module_of(config_of(*TINY, "execution.capacity=auto"))
    module_of(config_of(*TINY))
