"""Networks whose features tell how alike two sets of images are."""

import hashlib
import inspect
import io
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dcdit.checkpoints.timm_models import RANDOM, create_timm_model, fit_timm_model, read_model_weights
from dcdit.checks import Bounds, conform, reason_of
from dcdit.errors import NotFiniteError, UserError
from dcdit.runtime.devices import fingerprint
from dcdit.runtime.tensors import load_state_strict

_DIGITS = Path(__file__).with_name("digits.safetensors")
_WEIGHTS = "features.weights"
_ImageSize = Annotated[int, Bounds(1, 2048, hint="it is a number of pixels")] | None


class Features(NamedTuple):
    """What a network sees in images.

    Attributes:
        features: (B, F) float32.
        logits: (B, K) float32, unnormalised; None if the network knows no classes.
        spatial: (B, S) float32, features that know where, for sFID; None if the network has none.
    """

    features: Tensor
    logits: Tensor | None
    spatial: Tensor | None = None


class FeatureNetwork(nn.Module, ABC):
    """Features of images, in float32 and evaluation mode, whatever surrounds it.

    Attributes:
        name: stands beside every figure.
        num_features: F.
        num_logits: K; 0 without logits.
        num_spatial: S; 0 without spatial features.
        resize: description of how images come to the size that it sees.
        archive_statistics: whether ``mu`` and ``sigma`` in an ``.npz`` reference are of its features.
    """

    name: str
    num_features: int
    num_logits: int
    num_spatial: int = 0
    resize: str
    archive_statistics: bool = False

    @abstractmethod
    def see(self, images: Tensor) -> Features:
        """Return features of images (B, 3, height, width) uint8, on the device of the weights."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Return features on the CPU of images (B, 1 or 3, height, width) uint8; grey becomes three equal channels.

        Raises:
            NotFiniteError: if what is seen in an image is not finite.
        """
        device = next((parameter.device for parameter in self.parameters()), torch.device("cpu"))
        with torch.autocast(device.type, enabled=False):
            seen = self.see(images.to(device).expand(-1, 3, -1, -1))
        tensors = [None if tensor is None else tensor.float().cpu() for tensor in seen]
        for kind, tensor in zip(Features._fields, tensors, strict=True):
            if tensor is not None and not tensor.isfinite().all():
                row = int(tensor.isfinite().all(dim=1).int().argmin())
                raise NotFiniteError(f"the {kind} that {self.name} sees in this image are not finite", row)
        return Features(tensors[0], *tensors[1:])  # type: ignore[arg-type]  # features are always there

    def described(self) -> dict[str, Any]:
        """Return what features depend on beside the images, as :class:`dcdit.evaluation.plans.FeatureDescription`."""
        identity = {"name": self.name, "weights": fingerprint(self)}
        return {**identity, "num_features": self.num_features, "resize": self.resize}

    def frozen(self) -> "FeatureNetwork":
        """Return itself, ready for use; raise :class:`UserError` naming a parameter that is not finite."""
        for name, parameter in self.named_parameters():
            if not is_lazy(parameter) and not bool(parameter.isfinite().all()):
                raise UserError(f"features: {self.name} is no trained network: {name} is not finite")
        return self.eval().requires_grad_(False)


def _load(
    module: nn.Module, path: str, load: Callable[[nn.Module, dict[str, Tensor]], None] = load_state_strict
) -> None:
    counters = {name: own for name, own in module.state_dict().items() if name.endswith(".num_batches_tracked")}
    try:
        load(module, {**counters, **read_model_weights(path, _WEIGHTS)})  # old files lack the counters
    except UserError as error:
        text = str(error)
        fault = text if path in text else f"features.weights={path} do not fit {type(module).__name__}: {text}"
        raise UserError(fault) from error


class InceptionFeatures(FeatureNetwork):
    """Inception-v3 of the published FID, as torch-fidelity converted it from TensorFlow, its resizing included.

    Spatial features are the first 7 channels of the 17 x 17 map ``mixed_6/conv``, channels last, as the ADM suite's
    sFID takes them.

    Args:
        weights: file with the weights that torch-fidelity publishes; None downloads them.

    Raises:
        UserError: if the weights cannot be had.
    """

    name = "inception-v3-compat"
    num_features, num_logits, num_spatial = 2048, 1008, 7 * 17 * 17
    resize = "bilinear to 299 x 299 as TensorFlow 1 does"
    archive_statistics = True

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

        if weights is None:
            try:
                state = torch.hub.load_state_dict_from_url(
                    URL_INCEPTION_V3, map_location="cpu", check_hash=True, weights_only=True, progress=False
                )
            except OSError as error:
                raise UserError(
                    f"features=inception: its weights cannot be downloaded ({error}): fetch {URL_INCEPTION_V3}"
                    " elsewhere and give the file as features.weights=..., or take features=timm"
                ) from error
        else:
            state = read_model_weights(weights, _WEIGHTS)
        # The extractor unpickles whatever file it is given: give it one that was read safely and written anew.
        safe = io.BytesIO()
        torch.save(dict(state), safe)
        safe.seek(0)
        try:
            self.network = FeatureExtractorInceptionV3(
                self.name, ["2048", "logits_unbiased"], feature_extractor_weights_path=safe
            )
        except RuntimeError as error:
            fault = (str(error).splitlines()[1:] or [str(error)])[0].strip()[:200]
            raise UserError(f"features.weights={weights} are not those of Inception: {fault}") from error
        self.frozen()

    def see(self, images: Tensor) -> Features:
        """Return features, logits and spatial features."""
        maps: list[Tensor] = []
        watch = self.network.Mixed_6d.branch1x1.register_forward_hook(lambda *call: maps.append(call[-1]))
        try:
            features, logits = self.network(images)
        finally:
            watch.remove()
        return Features(features, logits, maps[0][:, :7].permute(0, 2, 3, 1).flatten(1))


class TimmFeatures(FeatureNetwork):
    """Any image model of timm: what its classifier sees, and the classifier's logits.

    Images are resized (bicubic, antialiased), not cropped.

    Args:
        model: timm's name of the model, such as ``vit_small_patch14_dinov2.lvd142m``.
        weights: local file with its weights; None downloads them; ``random`` for weights that were never trained.
        image_size: side of the images that it sees; None takes the model's own.

    Raises:
        UserError: if there is no such model, or its weights cannot be had.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: str, weights: str | None = None, image_size: int | None = None) -> None:
        super().__init__()
        from timm.data import resolve_model_data_config

        conform("features.image_size", image_size, _ImageSize)
        remedy = "give a local file as features.weights=..., or features.weights=random for what was never trained"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # random weights are the same in every process and every run
            network: Any = create_timm_model(model, "features.model", remedy, pretrained=weights is None)
        config = resolve_model_data_config(network)
        self.size = tuple(config["input_size"][1:]) if image_size is None else (image_size, image_size)
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(config[key]).view(1, -1, 1, 1))
        self.name = f"timm {model} {self.size[0]}px" + (", random weights" if weights == RANDOM else "")
        self.resize = f"bicubic, antialiased, to {self.size[0]} x {self.size[1]}"
        self.num_features = int(network.head_hidden_size)
        self.num_logits = int(network.num_classes)
        self.network = network
        try:
            if weights in (None, RANDOM):
                fit_timm_model(network, None, image_size)
            else:
                _load(network, str(weights), lambda module, state: fit_timm_model(module, state, image_size))
            self.frozen()
            if image_size is not None:
                self(torch.zeros(1, 3, *self.size, dtype=torch.uint8))
        except UserError:
            raise
        except Exception as error:  # timm's models differ
            raise UserError(
                f"features.image_size={image_size}: {model} takes no such images ({reason_of(error)}): give a multiple"
                " of its patch size, or null"
            ) from error

    def see(self, images: Tensor) -> Features:
        """Return what the classifier sees and, where there is one, its logits."""
        pixels = F.interpolate(images.float() / 255, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        network: Any = self.network
        seen = network.forward_head(network.forward_features((pixels - self.mean) / self.std), pre_logits=True)
        return Features(seen, network.get_classifier()(seen) if self.num_logits else None)


class OwnFeatures(FeatureNetwork):
    """A network of your own.

    Args:
        module: maps images (B, 3, height, width) uint8 to features (B, F), or to a tuple of features, logits (B, K) or
            None, and perhaps spatial features (B, S) for sFID.
        name: stands beside every figure; None takes the class's name.
        weights: file with its weights; None takes it as it was built.
        size: side of the images of a trial run, which tells F, K and S.
        archive_statistics: whether ``mu`` and ``sigma`` in an ``.npz`` reference are of these features, ``mu_s`` and
            ``sigma_s`` of the spatial ones.

    Raises:
        UserError: if the weights do not fit, or the module returns something else.
    """

    resize = "its own"

    def __init__(
        self,
        module: nn.Module,
        name: str | None = None,
        weights: str | None = None,
        size: int = 64,
        archive_statistics: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise UserError(f"features.module is a {type(module).__name__}, no torch.nn.Module")
        if weights is not None:
            _load(module, weights)
        self.network = module
        self.name = name or type(module).__name__
        self.archive_statistics = archive_statistics
        self.frozen()
        try:
            with torch.no_grad():
                seen = self.see(torch.zeros(2, 3, size, size, dtype=torch.uint8))
        except Exception as error:  # whatever the user's code raises
            raise UserError(
                f"features.module: {self.name} fails for images (2, 3, {size}, {size}) uint8, which it must take, and"
                f" convert as it needs: {reason_of(error)}"
            ) from error
        for kind, tensor in zip(seen._fields, seen, strict=True):
            if tensor is not None and (tensor.ndim != 2 or len(tensor) != 2):
                raise UserError(
                    f"features.module: {self.name} returns {kind} of shape {tuple(tensor.shape)} for 2 images, (2, F)"
                    " is needed"
                )
        self.num_features = seen.features.shape[1]
        self.num_logits = 0 if seen.logits is None else seen.logits.shape[1]
        self.num_spatial = 0 if seen.spatial is None else seen.spatial.shape[1]

    def described(self) -> dict[str, Any]:
        """Return what features depend on, with a digest of the code: the weights alone do not say what is computed."""
        return {**super().described(), "code": _code(type(self.network))}

    def see(self, images: Tensor) -> Features:
        """Return what the user's network returns."""
        output = self.network(images)
        return Features(*output) if isinstance(output, tuple) else Features(output, None)


def _code(kind: type) -> str | None:
    """Return the digest of the file in which a class is written; None where there is none."""
    try:
        return hashlib.sha256(Path(inspect.getfile(kind)).read_bytes()).hexdigest()[:16]
    except (OSError, TypeError):
        return None


class DigitsClassifier(FeatureNetwork):
    """A small classifier of handwritten digits; ``scripts/train_digit_features.py`` made its weights.

    Args:
        trained: take the weights that come with the package.
    """

    name = "digits classifier"
    num_features, num_logits = 32, 10
    resize = "bilinear, antialiased, to 16 x 16"

    def __init__(self, trained: bool = True) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, self.num_features),
            nn.GELU(),
        )
        self.classifier = nn.Linear(self.num_features, self.num_logits)
        if trained:
            self.load_state_dict(load_file(_DIGITS))
            self.frozen()

    def see(self, images: Tensor) -> Features:
        """Return what the classifier sees, and its logits."""
        grey = images.float().mean(dim=1, keepdim=True) / 127.5 - 1
        seen = self.network(F.interpolate(grey, (16, 16), mode="bilinear", antialias=True))
        return Features(seen, self.classifier(seen))
