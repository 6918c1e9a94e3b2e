"""FID, sFID, KID, Inception Score, precision and recall against values computed otherwise."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from support.configs import digit_features

from dcdit.errors import UserError
from dcdit.evaluation.features import DigitsClassifier, Features
from dcdit.evaluation.metrics import check_counts, choose_metrics, compare, enough_images_for, frechet
from dcdit.evaluation.statistics import Moments, Statistics


def gaussian(mean, covariance, count=500, seed=0):
    """Features whose sample mean and covariance are exactly these."""
    raw = np.random.default_rng(seed).standard_normal((count, len(mean)))
    raw -= raw.mean(axis=0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw.T))).T
    return torch.from_numpy(white @ np.linalg.cholesky(covariance).T + mean)


def statistics_of(features, spatial=None):
    return Statistics.of([Features(features, None, spatial)], len(features))


def fid(real, generated):
    metric = frechet(statistics_of(real).moments)
    metric.update(generated, real=False)
    return float(metric.compute())


def test_fid_of_two_known_gaussians():
    # diagonal: the distance is |m - n|^2 + sum (sqrt a - sqrt b)^2
    m, n, a, b = np.array([0.0, 1, 2, 3]), np.array([1.0, 1, 0, 3]), np.array([1.0, 4, 9, 2]), np.array([4.0, 1, 9, 8])
    expected = ((m - n) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert fid(gaussian(m, np.diag(a)), gaussian(n, np.diag(b), 700, seed=1)) == pytest.approx(expected, rel=1e-9)
    # one covariance a rotation of the other
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    one, other = np.diag([1.0, 9.0]), turn @ np.diag([1.0, 9.0]) @ turn.T
    expected = np.trace(one + other - 2 * sqrtm(one @ other).real)
    assert fid(gaussian(np.zeros(2), one), gaussian(np.zeros(2), other, seed=2)) == pytest.approx(expected, rel=1e-9)


def test_fid_of_real_features_against_scipy():
    real, generated = digit_features()
    moments = [(x.mean(0), np.cov(x.T)) for x in (real.features.double().numpy(), generated.features.double().numpy())]
    (mu, sigma), (nu, tau) = moments
    expected = ((mu - nu) ** 2).sum() + np.trace(sigma + tau - 2 * sqrtm(sigma @ tau).real)
    found = compare(statistics_of(real.features), lambda: iter([generated]), ["fid"])
    assert found["fid"] == pytest.approx(expected, rel=1e-6)
    assert expected > 0.01


def test_equal_sets_are_at_distance_zero():
    real, _ = digit_features()
    found = compare(statistics_of(real.features), lambda: iter([real]), ["fid"])
    assert found["fid"] == pytest.approx(0, abs=1e-4)


def test_kid_is_the_unbiased_mmd_of_the_cubic_kernel():
    real, generated = digit_features(200)
    x, y = real.features.double(), generated.features.double()
    kernel = lambda a, b: (a @ b.T / 32 + 1) ** 3  # noqa: E731
    n = len(x)
    within = sum((k.sum() - k.trace()) / (n * (n - 1)) for k in (kernel(x, x), kernel(y, y)))
    expected = within - 2 * kernel(x, y).mean()
    found = compare(statistics_of(real.features), lambda: iter([generated]), ["kid"])
    assert found["kid_subset"] == n
    assert "kid_std" not in found  # every subset is the whole
    assert found["kid"] == pytest.approx(float(expected), rel=1e-2)


def test_inception_score_at_its_ends():
    features = torch.randn(1000, 32)
    statistics = statistics_of(features)
    certain = 50 * torch.eye(10)[torch.arange(1000) % 10]
    for logits, expected in ((torch.zeros(1000, 10), 1.0), (certain, 10.0)):
        found = compare(statistics, lambda logits=logits: iter([Features(features, logits)]), ["is"])
        assert found["inception_score"] == pytest.approx(expected, rel=0.05)


def test_statistics_in_parts_and_on_disk(tmp_path):
    features = torch.randn(1000, 8)
    spatial = torch.randn(1000, 5)
    chunks = [Features(*each) for each in zip(features.split(300), [None] * 4, spatial.split(300), strict=True)]
    whole, parts = statistics_of(features, spatial), Statistics.of(chunks, 1000)
    parts.save(tmp_path / "s.npz")
    for found in (parts, Statistics.load(tmp_path / "s.npz")):
        for one, other in ((found.moments, whole.moments), (found.spatial, whole.spatial)):
            assert one.count == 1000
            assert torch.allclose(one.outer, other.outer)
            assert torch.allclose(one.total, other.total)
        assert torch.equal(found.features, features)
    content = (tmp_path / "s.npz").read_bytes()
    (tmp_path / "s.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="delete it, it is computed again"):
        Statistics.load(tmp_path / "s.npz")


def test_of_many_features_an_even_sample_is_kept(monkeypatch):
    monkeypatch.setattr("dcdit.evaluation.statistics._KEPT", 5)
    features = torch.arange(41.0)[:, None]
    chunks = (Features(each, None) for each in features.split(7))
    assert Statistics.of(chunks, 41).features.flatten().tolist() == [0, 10, 20, 30, 40]


def test_a_seed_repeats_the_figures_and_leaves_the_global_stream_alone():
    real, generated = digit_features()
    statistics = statistics_of(real.features)
    state = torch.get_rng_state()
    found = [compare(statistics, lambda: iter([generated]), ["kid", "is"], seed=3) for _ in range(2)]
    assert found[0] == found[1]
    assert torch.equal(torch.get_rng_state(), state)


def test_sums_of_a_gaussian_have_its_mean_and_covariance():
    random = np.random.default_rng(0)
    mean, root = random.standard_normal(6) * 100, random.standard_normal((6, 6))
    real, generated = gaussian(mean, root @ root.T), gaussian(np.ones(6), np.eye(6), seed=1)
    metric = frechet(Moments.of_gaussian(torch.from_numpy(mean), torch.from_numpy(root @ root.T)))
    metric.update(generated, real=False)
    assert float(metric.compute()) == pytest.approx(fid(real, generated), rel=1e-9)


def test_sfid_is_the_fid_of_the_spatial_features():
    random = np.random.default_rng(0)
    real, generated = (torch.from_numpy(random.standard_normal((300, 5)) * s + s).float() for s in (1.0, 1.5))
    moments = [(x.double().numpy().mean(0), np.cov(x.double().numpy().T)) for x in (real, generated)]
    (mu, sigma), (nu, tau) = moments
    expected = ((mu - nu) ** 2).sum() + np.trace(sigma + tau - 2 * sqrtm(sigma @ tau).real)
    noise = torch.randn(300, 3)
    found = compare(statistics_of(noise, real), lambda: iter([Features(noise, None, generated)]), ["sfid"])
    assert found == {"sfid": pytest.approx(expected, rel=1e-6)}


@given(seed=st.integers(0, 99), reals=st.integers(5, 60), count=st.integers(5, 60), shift=st.floats(0, 2))
@settings(max_examples=25, deadline=None)
def test_precision_and_recall_against_brute_force(seed, reals, count, shift):
    random = np.random.default_rng(seed)
    real, generated = random.standard_normal((reals, 4)), random.standard_normal((count, 4)) + shift

    def inside(points, centres):  # within the ball of a centre up to its third neighbour
        radii = np.sort(np.linalg.norm(centres[:, None] - centres, axis=2), axis=1)[:, 3]
        return (np.linalg.norm(points[:, None] - centres, axis=2) <= radii).any(axis=1).mean()

    seen = Features(torch.from_numpy(generated).float(), None)
    found = compare(statistics_of(torch.from_numpy(real).float()), lambda: iter([seen]), ["prc"])
    assert found["precision"] == pytest.approx(inside(generated, real), abs=1e-6)
    assert found["recall"] == pytest.approx(inside(real, generated), abs=1e-6)


def test_distances_are_never_held_all_at_once(monkeypatch):
    sizes, cdist = [], torch.cdist

    def watched(one, other):
        sizes.append(len(one) * len(other))
        return cdist(one, other)

    monkeypatch.setattr(torch, "cdist", watched)
    real, generated = torch.randn(2500, 3), torch.randn(3300, 3)
    compare(statistics_of(real), lambda: iter([Features(generated, None)]), ["prc"])
    assert max(sizes) <= 1000 * 3300


def test_the_inception_score_of_random_logits_against_its_definition():
    logits = torch.randn(5000, 7) * 2
    found = compare(statistics_of(logits), lambda: iter([Features(logits, logits)]), ["is"])
    torch.manual_seed(0)
    shuffled = logits[torch.randperm(5000)].double().softmax(1)  # torchmetrics splits at random
    scores = [float((part * (part / part.mean(0)).log()).sum(1).mean().exp()) for part in shuffled.chunk(10)]
    assert found["inception_score"] == pytest.approx(np.mean(scores), rel=1e-4)
    assert found["inception_score_std"] == pytest.approx(np.std(scores, ddof=1), rel=1e-3)


def test_a_metric_that_is_not_finite_is_no_figure():
    features = torch.full((50, 2), 1e38)
    with pytest.raises(UserError, match="is not a finite number"):
        compare(statistics_of(torch.randn(50, 2)), lambda: iter([Features(features, None)]), ["kid"])


class Known:
    """As much as is asked of a reference."""

    def __init__(self, count, published=()):
        self.count, self.published = count, list(published)


def test_too_few_images():
    network = DigitsClassifier()
    for wanted, count, reference, message in (
        (["fid"], 32, Known(100), r"count: 32 images are too few for FID, .* 32 features .* more than 32"),
        (["fid"], 100, Known(32), r"reference: 32 images are too few for FID"),
        (["kid"], 1, Known(100), "count: 1 image is too few"),
        (["prc"], 100, Known(3), "reference: 3 images are too few for precision and recall, more than 3"),
        (["fid"], 32, Known(0, ["features"]), r"count: 32 images are too few for FID"),
    ):
        with pytest.raises(UserError, match=message):
            check_counts(wanted, network, count, reference)
    assert check_counts(["kid"], network, 10, Known(10)) == 2
    assert check_counts(["fid", "prc"], network, 33, Known(4, ["features"])) == 33


def test_metrics_with_too_few_images_are_left_out_unless_they_were_asked_for(capsys):
    network, all_metrics = DigitsClassifier(), ["fid", "kid", "is", "prc"]
    assert enough_images_for(all_metrics, network, 20, Known(100), "count") == ["kid", "is", "prc"]
    assert "Left out: FID: count: 20 images are too few" in capsys.readouterr().out
    assert enough_images_for(all_metrics, network, 50, Known(100), "count") == all_metrics
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="1 image is too few"):
        enough_images_for(all_metrics, network, 1, Known(100), "count")


def test_metrics_that_a_network_or_a_reference_has_not(capsys):
    network = DigitsClassifier()
    assert choose_metrics(None, network, True, []) == ["fid", "kid", "is", "prc"]
    assert "Left out: no sFID without spatial features, which digits classifier has not" in capsys.readouterr().out
    assert choose_metrics(None, network, False, ["features"]) == ["fid", "is"]
    with pytest.raises(UserError, match=r"metrics: no sFID without spatial features.*: take metrics=\[fid\]"):
        choose_metrics(["fid", "sfid"], network, True, [])
    with pytest.raises(UserError, match=r"no KID without images, which the reference has not"):
        choose_metrics(["kid"], network, False, ["features"])
    with pytest.raises(UserError, match=r"no FID without images, or mu and sigma, .* not known to be of digits"):
        choose_metrics(["fid"], network, False, [])
    network.num_logits = 0
    with pytest.raises(UserError, match="no IS without class logits"):
        choose_metrics(["is"], network, True, [])
