"""Data sets of torchvision that are on the disk already; nothing is ever downloaded."""

import inspect
import io
from typing import Any

import numpy as np
from typing_extensions import override

from dcdit.checks import reason_of, shown
from dcdit.errors import UserError
from dcdit.extraction.classes import notes_on_classes, renumbered
from dcdit.extraction.readers import TORCHVISION, Torchvision
from dcdit.extraction.sources import (
    NumberedItem,
    Request,
    ShuffledSource,
    UnreadableError,
    UnusableImageError,
)
from dcdit.runtime.files import content_digest


class TorchvisionSource(ShuffledSource):
    """The images of a data set of torchvision, shuffled once by seed.

    Args:
        request: of the command.
        dataset: the data set.
        name: its name, for messages and for the record of the extraction.
        labels: of its images.

    Raises:
        UserError: if its classes are others than the command asks for.
    """

    def __init__(self, request: Request, dataset: Any, name: str, labels: list[int]) -> None:
        names = getattr(dataset, "classes", None) or [str(label) for label in range(max(labels) + 1)]
        self.classes, own, self.class_order = renumbered(name, list(map(str, names)), labels, request.classes)
        order = np.random.default_rng(request.seed).permutation(len(own))
        super().__init__(np.array(own), order, request.per_task)
        self._dataset, self._name = dataset, name
        self.inventory = {name: f"{len(own)} images, labels {content_digest({'labels': own})[:8]}"}
        self.inventory |= request.classes.recorded if request.classes else {}
        self.notes = tuple(notes_on_classes(self.classes, own))

    @override
    def item(self, number: int, label: int) -> NumberedItem:
        return NumberedItem(label, f"{self._name}/{number}", self._name, number=number)

    @override
    def read(self, item: Any) -> bytes:
        buffer = io.BytesIO()
        try:
            image, _ = self._dataset[item.number]
            image.save(buffer, "PNG", compress_level=0)  # no pixel changes, and it is decoded as all others are
        except OSError as error:
            if error.errno is not None:
                raise UnreadableError(
                    f"it cannot be read ({error.strerror}): see that its disk is connected"
                ) from error
            raise UnusableImageError(f"corrupt image: {reason_of(error)}") from error
        except Exception as error:  # decoders raise whatever a broken file provokes
            raise UnusableImageError(f"corrupt image: {reason_of(error)}") from error
        return buffer.getvalue()


def open_torchvision(settings: Torchvision, request: Request) -> TorchvisionSource:
    """The data set that the settings name.

    Raises:
        UserError: if it is not below ``source``, or has no such part.
    """
    from torchvision import datasets

    kind = getattr(datasets, settings.dataset)
    where = f"source={request.source} reader.dataset={settings.dataset}"
    try:
        dataset = kind(request.source, **_part(settings, set(inspect.signature(kind).parameters)))
    except UserError:
        raise
    except ValueError as error:  # by torchvision's own words, a part that it does not know
        raise UserError(f"reader.part={settings.part}: {reason_of(error)}") from None
    except Exception as error:  # whatever missing and broken files provoke
        raise UserError(
            f"{where}: torchvision does not find it there ({reason_of(error)}): give the folder that it calls root;"
            " dcdit downloads no data set"
        ) from None
    labels = [int(label) for label in getattr(dataset, TORCHVISION[settings.dataset])]
    if not labels:
        raise UserError(f"{where}: it has no images")
    name = settings.dataset if settings.part is None else f"{settings.dataset} {settings.part}"
    return TorchvisionSource(request, dataset, name, labels)


def _part(settings: Torchvision, parameters: set[str]) -> dict[str, Any]:
    """The argument that chooses a part of a data set; UserError if it is missing, or there are no parts."""
    part, name = settings.part, settings.dataset
    if "split" in parameters:
        if part is None:
            raise UserError(f"reader.part is not set: {name} is divided, such as into train and test")
        return {"split": part}
    if "train" in parameters:
        if part not in ("train", "test"):
            raise UserError(f"reader.part={shown(part)}: {name} is divided into train and test")
        return {"train": part == "train"}
    if part is not None:
        raise UserError(f"reader.part={shown(part)}: {name} is not divided, leave it out")
    return {}
