"""Checks that validation splits and references belong to the training split, which decides how they are read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from dcdit.checks import shown
from dcdit.data.latents import IDENTITY, LatentSpec
from dcdit.data.manifest import Manifest
from dcdit.errors import UserError


@dataclass(frozen=True)
class Validation:
    """A validation split as a training split sees it.

    Attributes:
        manifest: that of the validation split, with scale and shift of the training split.
        labels: the label in the training split of each label of the validation split.
        note: a sentence on what differs harmlessly; empty if nothing does.
    """

    manifest: Manifest
    labels: tuple[int, ...]
    note: str


def match_validation(training: Manifest, own: Manifest) -> Validation:
    """Check that a validation split belongs to a training split, and read it with the training split's scale.

    Representation, stored type and flipped images may differ, for they are other forms of the same latents. Scale and
    shift are the training split's.

    Raises:
        UserError: with both values, if shape, autoencoder, its configured scale, or classes differ. Classes may be
            missing if the names say which.
    """
    check_encoding(training.spec, own.spec)
    configured = training.normalise == own.normalise == "autoencoder"
    if configured and (difference := own.spec.difference_in_scale(training.spec)):
        raise UserError(f"it is scaled otherwise than the training split: {difference}. Extract both again alike")
    labels = labels_within(training.classes, own.classes)
    notes = []
    if own.spec.difference_in_scale(training.spec):
        notes.append("Validation is normalised by scale and shift of the training split, not by its own")
    if missing := len(training.classes) - len(labels):
        notes.append(f"Validation has no samples of {missing} of {len(training.classes)} classes")
    manifest = replace(own, scale=training.scale, shift=training.shift, normalise=training.normalise)
    return Validation(manifest, labels, "; ".join(notes))


def check_encoding(training: LatentSpec, own: LatentSpec) -> None:
    """Raise :class:`UserError` if latents differ in shape or autoencoder from those that a network is trained on."""
    if difference := own.difference_in_encoding(training):
        raise UserError(
            f"its latents are not of the kind that the network is trained on: {difference}. Extract both alike"
        )


def labels_within(classes: Sequence[str], own: Sequence[str]) -> tuple[int, ...]:
    """The label in the training split, with ``classes``, of each label of another split, with ``own`` ones.

    Raises:
        UserError: unless ``own`` are the same in the same order, some of which may be missing.
    """
    if tuple(own) == tuple(classes):
        return tuple(range(len(classes)))
    known = {name: label for label, name in enumerate(classes)}
    remedy = "Extract the validation split again with the classes of the training split"
    for label, name in enumerate(own):
        if name not in known:
            raise UserError(f"its class {label}, {shown(name)}, is none of the training split. {remedy}")
    labels = tuple(known[name] for name in own)
    if len(known) < len(classes) or any(one >= two for one, two in pairwise(labels)):
        raise UserError(
            f"its classes ({shown(list(own))}) are not those of the training split ({shown(list(classes))}) in the same"
            f" order. {remedy}"
        )
    if tuple(own) == tuple(map(str, range(len(own)))):
        raise UserError(
            f"its {len(own)} classes have numbers for names, which do not say which of the {len(classes)} classes of"
            f" the training split they are. {remedy}"
        )
    return labels


def check_reference(network: LatentSpec, own: LatentSpec) -> str:
    """Check that decoded latents can be compared with what a network samples.

    Images themselves (``identity``) can always, and so can latents of an autoencoder whose weights nobody recorded.

    Args:
        network: the latents that it was trained on.
        own: those of the reference.

    Returns:
        A sentence if there are fewer or more classes; else empty.

    Raises:
        UserError: if another autoencoder made them.
    """
    if own.autoencoder != IDENTITY and None not in (own.fingerprint, network.fingerprint):
        check_encoding(network, own)
    if len(own.classes) != len(network.classes):
        return f"holds {len(own.classes)} classes, the network samples {len(network.classes)}: figures show that too"
    return ""
