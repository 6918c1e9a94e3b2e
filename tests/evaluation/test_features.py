"""Feature networks: what they see, and where their weights come from."""

import os
import pickle
from importlib import import_module

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dcdit.data.autoencoder import to_uint8
from dcdit.data.builtin import Digits as Source
from dcdit.errors import NotFiniteError, UserError
from dcdit.evaluation.features import DigitsClassifier, Features, InceptionFeatures, OwnFeatures, TimmFeatures


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """A file as torch-fidelity publishes it, with random weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {})
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(network.state_dict(), path)
    return path


def test_the_classifier_reads_digits_it_has_not_seen(digits):
    images, labels = Source(grid=8).images()
    import numpy as np

    unseen = np.random.default_rng(0).permutation(len(images))[:180]
    seen = DigitsClassifier()(to_uint8(images[unseen]))
    assert (seen.features.shape, seen.logits.shape) == ((180, 32), (180, 10))
    assert (seen.logits.argmax(1) == labels[unseen]).float().mean() > 0.95


def test_inception_with_weights_from_a_file(inception_weights):
    network = InceptionFeatures(str(inception_weights))
    images = torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8)
    seen = network(images)
    assert (seen.features.shape, seen.logits.shape) == ((2, 2048), (2, 1008))
    assert (seen.spatial.shape, network.num_spatial) == ((2, 2023), 2023)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):  # whatever surrounds it
        assert torch.equal(network(images).features, seen.features)
    # grey images are three equal channels
    grey = images[:, :1]
    assert torch.equal(network(grey).features, network(grey.repeat(1, 3, 1, 1)).features)


def test_spatial_features_are_seven_channels_of_mixed_6_channels_last(inception_weights):
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as resize

    network = InceptionFeatures(str(inception_weights))
    images = torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8)
    seen, inner = network(images), network.network
    x = (resize(images.float(), size=(299, 299), align_corners=False) - 128) / 128
    with torch.no_grad():
        for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3"):
            x = getattr(inner, name)(x)
        for name in ("MaxPool_2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c"):
            x = getattr(inner, name)(x)
        branch = inner.Mixed_6d.branch1x1
        x = torch.relu(branch.bn(branch.conv(x)))
    assert x.shape == (2, 192, 17, 17)
    by_hand = seen.spatial.view(2, 17, 17, 7)
    torch.testing.assert_close(by_hand[1, 3, 5], x[1, :7, 3, 5])
    torch.testing.assert_close(by_hand.permute(0, 3, 1, 2), x[:, :7])


def test_features_that_are_not_finite_are_named():
    class Breaks(nn.Module):
        def forward(self, images):
            found = images.float().mean(dim=(2, 3))
            return found / (found != 7), found

    network = OwnFeatures(Breaks())
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    images[2] = 7
    with pytest.raises(NotFiniteError, match="the features that Breaks sees in this image are not finite") as caught:
        network(images)
    assert caught.value.row == 2


class _Hostile:
    def __reduce__(self):
        return (os.system, ("touch hostile-ran",))


def test_no_weights_file_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.zeros(1), "x": _Hostile()}, tmp_path / "hostile.pth")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(_Hostile()))
    for name in ("hostile.pth", "plain.pkl"):
        with pytest.raises(UserError):
            InceptionFeatures(str(tmp_path / name))
    assert not (tmp_path / "hostile-ran").exists()


def test_weights_that_cannot_be_had(tmp_path, monkeypatch):
    def unreachable(*arguments, **values):
        raise OSError("<urlopen error [Errno -2] Name or service not known>")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    with pytest.raises(UserError, match=r"cannot be downloaded .* features.weights=\.\.\."):
        InceptionFeatures()
    monkeypatch.setattr("timm.create_model", unreachable)
    with pytest.raises(UserError, match=r"features.model='resnet10t': its weights cannot be downloaded"):
        TimmFeatures("resnet10t")
    with pytest.raises(UserError, match="there is no such file"):
        InceptionFeatures(str(tmp_path / "nowhere.pth"))
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="are not those of Inception"):
        InceptionFeatures(str(tmp_path / "other.safetensors"))


def test_any_model_of_timm(tmp_path):
    import timm

    torch.manual_seed(0)
    save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "weights.safetensors")
    network = TimmFeatures("resnet10t", str(tmp_path / "weights.safetensors"))
    seen = network(torch.randint(256, (2, 1, 32, 32), dtype=torch.uint8))
    assert seen.features.shape == (2, network.num_features)
    assert seen.logits.shape == (2, 1000)
    with pytest.raises(UserError, match="did you mean resnet10t"):
        TimmFeatures("resnet10")
    with pytest.raises(UserError, match="do not fit"):
        TimmFeatures("resnet18", str(tmp_path / "weights.safetensors"))


def test_a_model_of_timm_sees_images_of_another_side(tmp_path, monkeypatch):
    import timm

    torch.manual_seed(1)
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "own.safetensors")
    images = torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8)
    own = TimmFeatures("test_vit", str(tmp_path / "own.safetensors"))
    small = TimmFeatures("test_vit", str(tmp_path / "own.safetensors"), 96)
    assert (own.size, small.size) == ((160, 160), (96, 96))
    assert "96 x 96" in small.resize
    assert not torch.allclose(own(images).features, small(images).features)
    # weights of a model that was trained at this side are the same network
    save_file(small.network.state_dict(), tmp_path / "small.safetensors")
    again = TimmFeatures("test_vit", str(tmp_path / "small.safetensors"), 96)
    assert torch.equal(again(images).features, small(images).features)
    # the paper's preprocessing: bicubic, then mean and deviation of the model, then the class token
    pixels = torch.nn.functional.interpolate(images / 255, (96, 96), mode="bicubic", antialias=True).clamp(0, 1)
    token = small.network.forward_features((pixels - small.mean) / small.std)[:, 0]
    expected = small.network.fc_norm(token)
    assert torch.allclose(small(images).features, expected, atol=1e-5)
    with pytest.raises(
        UserError, match=r"features.image_size=97: test_vit takes no such images .* multiple of its patch"
    ):
        TimmFeatures("test_vit", str(tmp_path / "own.safetensors"), 97)
    with pytest.raises(UserError, match="do not fit"):
        TimmFeatures("test_vit2", str(tmp_path / "own.safetensors"), 96)


def test_random_weights_are_taken_only_where_they_are_asked_for(monkeypatch):
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    one, two = (TimmFeatures("test_vit", "random", 64) for _ in range(2))
    assert torch.equal(one(images).features, two(images).features)
    assert one.name == "timm test_vit 64px, random weights"
    monkeypatch.setattr("timm.create_model", lambda *given, pretrained, **others: pytest.fail(f"{pretrained}"))
    with pytest.raises(pytest.fail.Exception, match="True"):
        TimmFeatures("test_vit")


class Mean(nn.Module):
    """Mean colour as features."""

    def forward(self, images):
        return images.float().mean(dim=(2, 3))


class Flat(nn.Module):
    def forward(self, images):
        return images.float()


def test_own_modules(tmp_path):
    network = OwnFeatures(Mean())
    assert (network.name, network.num_features, network.num_logits) == ("Mean", 3, 0)
    white = network(torch.full((1, 3, 4, 4), 255, dtype=torch.uint8))
    assert white == Features(white.features, None)
    assert white.features.tolist() == [[255, 255, 255]]
    with pytest.raises(UserError, match=r"Flat returns features of shape \(2, 3, 64, 64\)"):
        OwnFeatures(Flat())
    with pytest.raises(UserError, match=r"is a str, no torch\.nn\.Module"):
        OwnFeatures("text")


def test_other_weights_are_another_network():
    one, other = DigitsClassifier(), DigitsClassifier()
    assert one.described() == other.described()
    with torch.no_grad():
        other.classifier.bias += 1
    assert one.described() != other.described()


def test_other_code_is_another_network(tmp_path, monkeypatch):
    """Weights tell nothing of a module that has none."""
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for factor in (1, 2):
        (tmp_path / f"mine{factor}.py").write_text(
            "import torch\n\n\nclass Net(torch.nn.Module):\n    def forward(self, images):\n"
            f"        return images.float().mean(dim=(2, 3)) * {factor}\n"
        )
        found.append(OwnFeatures(import_module(f"mine{factor}").Net()).described())
    assert found[0]["weights"] == found[1]["weights"]
    assert found[0] != found[1]
