"""The kinds of sources: how images and their classes lie in ``source``, and the table of them. No torch here."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from dcdit.checks import Matches, NamedSettings, OneOf, Table, checked

if TYPE_CHECKING:
    from dcdit.extraction.sources import ImageSource, Request

Given = Annotated[str, Matches("(?s).+", "a name: it is empty")]


@dataclass(frozen=True)
class ReaderSettings(NamedSettings):
    """The settings of one kind of source; ``configs/reader`` describes each key.

    Attributes:
        name: its name in :data:`READERS`.
        implementation: a function of these settings and a :class:`dcdit.extraction.sources.Request`.
        names_classes: whether ``source`` names its classes, so that their number alone says nothing about them.
    """

    names_classes: ClassVar[bool] = False

    def open(self, request: "Request") -> "ImageSource":
        """The images; UserError, before any is read, if they or their classes are not what the settings say."""
        source: ImageSource = self.call_implementation(request)
        return source


@checked
@dataclass(frozen=True)
class Auto(ReaderSettings):
    """Class folders or webdataset shards, whichever is there."""

    name: ClassVar[str] = "auto"
    implementation: ClassVar[str] = "dcdit.extraction.opening:open_folders_or_tars"


@checked
@dataclass(frozen=True)
class Labels(ReaderSettings):
    """Images in one folder, and a file of their classes."""

    name: ClassVar[str] = "labels"
    implementation: ClassVar[str] = "dcdit.extraction.labelled:open_labelled"
    labels: Given
    image_column: Given | None
    label_column: Given | None
    ending: str
    partial: bool


@checked
@dataclass(frozen=True)
class ImageNetVal(ReaderSettings):
    """The validation images of ImageNet as they are published, and the development kit with their classes."""

    name: ClassVar[str] = "imagenet_val"
    implementation: ClassVar[str] = "dcdit.extraction.imagenet:open_imagenet_val"
    names_classes: ClassVar[bool] = True
    devkit: Given
    synsets: Given | None


@checked
@dataclass(frozen=True)
class Parquet(ReaderSettings):
    """Tables as the Hugging Face hub has them: local files, or a repository of data sets."""

    name: ClassVar[str] = "parquet"
    implementation: ClassVar[str] = "dcdit.extraction.parquet:open_parquet"
    files: Given | None
    image_column: Given
    label_column: Given
    revision: Given
    stream: bool


TORCHVISION = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST", "EuroSAT", "Country211"), "targets"),
    **dict.fromkeys(("SVHN", "STL10"), "labels"),
    **dict.fromkeys(("DTD", "FGVCAircraft", "Flowers102", "Food101", "OxfordIIITPet", "SUN397"), "_labels"),
}
"""The classes of ``torchvision.datasets`` that are read, with the attribute that holds the labels of all images."""


@checked
@dataclass(frozen=True)
class Torchvision(ReaderSettings):
    """A data set of torchvision that is on the disk already."""

    name: ClassVar[str] = "torchvision"
    implementation: ClassVar[str] = "dcdit.extraction.torchvision_data:open_torchvision"
    names_classes: ClassVar[bool] = True
    dataset: Annotated[str, OneOf(TORCHVISION)]
    part: Given | None


READERS: Table[type[ReaderSettings]] = Table(
    "reader.name", {kind.name: kind for kind in (Auto, Labels, ImageNetVal, Parquet, Torchvision)}
)
"""The kinds of sources, by the name that ``reader`` takes."""
