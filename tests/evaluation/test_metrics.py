"""FID, KID and Inception Score against values computed otherwise."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from support.configs import digit_features

from dcdit.errors import UserError
from dcdit.evaluation.features import DigitsClassifier, Features
from dcdit.evaluation.metrics import Statistics, check_metrics, compare, frechet


def gaussian(mean, covariance, count=500, seed=0):
    """Features whose sample mean and covariance are exactly these."""
    raw = np.random.default_rng(seed).standard_normal((count, len(mean)))
    raw -= raw.mean(axis=0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw.T))).T
    return torch.from_numpy(white @ np.linalg.cholesky(covariance).T + mean)


def fid(real, generated):
    metric = frechet(Statistics.of([real], len(real)))
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
    found = compare(Statistics.of([real.features], len(real.features)), lambda: iter([generated]), ["fid"])
    assert found["fid_torch"] == pytest.approx(expected, rel=1e-6)
    assert expected > 0.01


def test_equal_sets_are_at_distance_zero():
    real, _ = digit_features()
    found = compare(Statistics.of([real.features], len(real.features)), lambda: iter([real]), ["fid"])
    assert found["fid_torch"] == pytest.approx(0, abs=1e-4)


def test_kid_is_the_unbiased_mmd_of_the_cubic_kernel():
    real, generated = digit_features(200)
    x, y = real.features.double(), generated.features.double()
    kernel = lambda a, b: (a @ b.T / 32 + 1) ** 3  # noqa: E731
    n = len(x)
    within = sum((k.sum() - k.trace()) / (n * (n - 1)) for k in (kernel(x, x), kernel(y, y)))
    expected = within - 2 * kernel(x, y).mean()
    found = compare(Statistics.of([real.features], n), lambda: iter([generated]), ["kid"])
    assert found["kid_subset"] == n
    assert "kid_std" not in found  # every subset is the whole
    assert found["kid"] == pytest.approx(float(expected), rel=1e-2)


def test_inception_score_at_its_ends():
    features = torch.randn(1000, 32)
    statistics = Statistics.of([features], 1000)
    certain = 50 * torch.eye(10)[torch.arange(1000) % 10]
    for logits, expected in ((torch.zeros(1000, 10), 1.0), (certain, 10.0)):
        found = compare(statistics, lambda logits=logits: iter([Features(features, logits)]), ["is"])
        assert found["inception_score"] == pytest.approx(expected, rel=0.05)


def test_statistics_in_parts_and_on_disk(tmp_path):
    features = torch.randn(1000, 8)
    whole, parts = Statistics.of([features], 1000), Statistics.of(features.split(300), 1000)
    parts.save(tmp_path / "s.npz")
    for found in (parts, Statistics.load(tmp_path / "s.npz")):
        assert torch.allclose(found.outer, whole.outer)
        assert torch.allclose(found.total, whole.total)
        assert torch.equal(found.features, features)
    content = (tmp_path / "s.npz").read_bytes()
    (tmp_path / "s.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="delete it, it is computed again"):
        Statistics.load(tmp_path / "s.npz")


def test_of_many_features_an_even_sample_is_kept(monkeypatch):
    monkeypatch.setattr("dcdit.evaluation.statistics._KEPT", 5)
    features = torch.arange(41.0)[:, None]
    assert Statistics.of(features.split(7), 41).features.flatten().tolist() == [0, 10, 20, 30, 40]


def test_a_seed_repeats_the_figures_and_leaves_the_global_stream_alone():
    real, generated = digit_features()
    statistics = Statistics.of([real.features], len(real.features))
    state = torch.get_rng_state()
    found = [compare(statistics, lambda: iter([generated]), ["kid", "is"], seed=3) for _ in range(2)]
    assert found[0] == found[1]
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_had():
    network = DigitsClassifier()
    for wanted, count, reference, message in (
        (["fid"], 32, 100, r"count: 32 images are too few for FID, .* 32 features .* more than 32"),
        (["fid"], 100, 32, r"reference: 32 images are too few for FID"),
        (["kid"], 1, 100, "count: 1 image is too few"),
    ):
        with pytest.raises(UserError, match=message):
            check_metrics(wanted, network, count, reference)
    network.num_logits = 0
    with pytest.raises(UserError, match="IS needs class logits"):
        check_metrics(["is"], network, 100, 100)
    check_metrics(["kid"], network, 10, 10)
