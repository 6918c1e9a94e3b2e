"""Pictures of what a router kept: every pixel says what it should."""

import numpy as np
import pytest
import torch
from PIL import Image
from support.configs import call, compose_config

from dcdit import sample
from dcdit.errors import UserError
from dcdit.sampling.figures import Boundaries, Moment, panels
from dcdit.sampling.overlays import DROPPED, KEPT, enlarged, fitted, overlay, probabilities, side_by_side, spread


def colours(picture):
    return {tuple(map(int, colour)) for colour in picture.reshape(-1, 3)}


@pytest.mark.parametrize(("grid", "side"), [(4, 64), (4, 256), (5, 64), (32, 256)])
def test_an_overlay_shows_each_position_where_it_is(grid, side):
    generator = np.random.default_rng(grid)
    natural = generator.random((grid, grid)) < 0.5
    kept = natural & (generator.random((grid, grid)) < 0.5)
    image = np.full((side, side, 3), 200, dtype=np.uint8)
    drawn = overlay(image, kept, natural)
    middle = (np.arange(grid) * 2 + 1) * side // (2 * grid)
    centres = drawn[middle][:, middle]
    if side // grid >= 8:  # else there is nothing but outline
        assert (centres[kept] == 200).all()
        assert ((centres[~kept] > 96) & (centres[~kept] < 200)).all()
    found = colours(drawn)
    assert (KEPT in found) == kept.any()
    assert (DROPPED in found) == (natural & ~kept).any()
    reused = overlay(image, kept & False, natural)
    assert len(colours(reused)) == 1  # nothing ran, and nothing was dropped
    assert np.array_equal(spread(kept, side, side)[middle][:, middle], kept)
    outlined = (drawn == KEPT).all(axis=-1)
    assert not (outlined & ~spread(kept, side, side)).any()
    assert (image == 200).all()


def test_neighbours_have_one_outline():
    kept = np.zeros((3, 3), dtype=bool)
    kept[1, :2] = True
    drawn = overlay(np.zeros((96, 96, 3), dtype=np.uint8), kept, kept)
    assert tuple(drawn[48, 0]) == KEPT  # at the border of the picture
    assert tuple(drawn[48, 32]) != KEPT  # between the two
    assert tuple(drawn[32, 10]) == tuple(drawn[63, 10]) == tuple(drawn[48, 63]) == KEPT


def test_nothing_kept_or_all():
    image = np.full((32, 32, 3), 200, dtype=np.uint8)
    none, every = np.zeros((4, 4), dtype=bool), np.ones((4, 4), dtype=bool)
    assert len(colours(overlay(image, none, none))) == 1
    assert colours(overlay(image, every, every)) == {KEPT, (200, 200, 200)}


def test_probabilities_keep_their_scale():
    for value in (0.0, 0.5, 1.0):
        alone = probabilities(np.full((2, 2), value), np.zeros((2, 2), dtype=bool), 8, 8)
        beside = probabilities(np.array([[value, 0.25]] * 2), np.zeros((2, 2), dtype=bool), 8, 8)
        assert np.array_equal(alone[:, :4], beside[:, :4])


def test_large_images_are_reduced_where_many_stand_beside_each_other():
    """Of 2,048 pixels, fifty frames of four panels would take 2.5 GB."""
    image = np.random.default_rng(0).integers(256, size=(1030, 2060, 1), dtype=np.uint8)
    reduced = fitted(image, 256)
    assert reduced.shape == (512, 1024, 3)
    assert abs(reduced.mean() - image.mean()) < 1
    small = image[:16, :16]
    assert np.array_equal(fitted(small, 256), enlarged(small, 256))
    prob = np.full((8, 8), 0.5)
    mask = np.eye(8, dtype=bool)
    moment = Moment(500.0, torch.zeros(1), torch.zeros(1), Boundaries(prob, mask, mask))
    shown = panels(moment, image[:, :1030], image[:, :1030])
    assert {picture.shape for _, picture in shown} == {(512, 512, 3)}


def test_pictures_stand_beside_each_other():
    one, two = np.full((16, 16, 1), 10, dtype=np.uint8), np.full((32, 32, 3), 20, dtype=np.uint8)
    both = side_by_side([("one", one), ("two", two)], "a title that is longer than the picture is wide " * 3, 64)
    assert np.array_equal(enlarged(one, 64), np.full((64, 64, 3), 10))
    assert {(10, 10, 10), (20, 20, 20), (255, 255, 255)} <= colours(both)
    assert both.shape[0] > side_by_side([("one", one), ("two", two)], "", 64).shape[0] + 2 * 20


@pytest.mark.parametrize("form", ["gif", "webp"])
def test_a_trajectory_that_moves(three_steps, tmp_path, form):
    words = (f"checkpoint={three_steps}", "classes=[1,2]", "per_class=2", "sampler=ddim", "sampler.steps=6")
    out = call(sample, compose_config(*words, f"animation={form}", f"out={tmp_path}/pictures", name="sample"))
    with Image.open(out / f"trajectory.{form}") as moving:
        assert moving.n_frames == 7  # each evaluation, and the image
        frames = []
        for number in range(7):
            moving.seek(number)
            frames.append(np.asarray(moving.convert("RGB")))
    assert all(frame.shape == frames[0].shape for frame in frames)
    assert not np.array_equal(frames[0], frames[-1])
    with np.load(out / "latents.npz") as stored:
        first = torch.from_numpy(stored["latents"][0, 0])
    seen = ((first + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8).numpy()
    sharp = enlarged(seen[..., None], 256)
    top = frames[-1].shape[0] - 8 - 256
    difference = np.abs(frames[-1][top : top + 256, 8 : 8 + 256].astype(int) - sharp)
    assert difference.max() <= (2 if form == "webp" else 40)  # a GIF has 256 colours


def test_a_network_without_router_has_a_trajectory_too(tiny, tmp_path):
    from support.configs import PLAIN_DIT

    run = tiny("plain", "trainer.max_steps=2", *PLAIN_DIT)
    words = (f"checkpoint={run}", "classes=[0]", "per_class=1", "sampler.steps=3", "animation=gif")
    out = call(sample, compose_config(*words, name="sample"))
    assert {path.name for path in out.iterdir()} == {"samples.png", "latents.npz", "trajectory.gif"}


def test_earlier_pictures_are_kept(tmp_path):
    def files() -> dict[str, bytes]:
        return {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    words = ("checkpoint=digits", f"out={tmp_path}", "classes=[0]", "per_class=1", "sampler.steps=1")
    calls: list[dict[str, bytes]] = []
    for number, more in enumerate((["animation=gif"], ["frames=0"], [])):
        call(sample, compose_config(*words, f"seed={number}", *more, name="sample"))
        newest = {name: content for name, content in files().items() if "/" not in name}
        calls.append(newest)
    assert [set(call) for call in calls] == [
        {"samples.png", "latents.npz", "boundaries.png", "trajectory.gif"},
        {"samples.png", "latents.npz"},
        {"samples.png", "latents.npz", "boundaries.png"},
    ]
    for number, sampled in enumerate(calls[:-1], 1):
        kept = {name: content for name, content in files().items() if name.startswith(f"earlier/{number:04d}/")}
        assert kept == {f"earlier/{number:04d}/{name}": content for name, content in sampled.items()}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["per_class=10000"], "per_class=10000: 100000 images of 16 x 16 pixels are too many for one picture"),
        (["frames=101"], "frames=101 is outside"),
    ],
)
def test_pictures_that_no_memory_holds_are_refused_before_sampling(tmp_path, monkeypatch, words, message):
    monkeypatch.setattr("dcdit.sampling.setup.generate", lambda *ignored, **options: pytest.fail("sampled"))
    with pytest.raises(UserError, match=message):
        call(sample, compose_config("checkpoint=digits", f"out={tmp_path}/out", *words, name="sample"))
    assert not (tmp_path / "out").exists()
