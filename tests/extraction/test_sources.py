"""Folders and tar files as people have them: which images are used, and what is said of the rest."""

import gzip
import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcdit.errors import UserError
from dcdit.extraction.classes import WantedClasses, class_names
from dcdit.extraction.folders import FolderSource, image_files
from dcdit.extraction.sources import Item, Listing, UnusableImageError
from dcdit.extraction.tars import TarSource

SERVICE = [
    *("__MACOSX/a.png", "@eaDir/a.png", ".ipynb_checkpoints/a.png", "._a.png", "Thumbs.db", ".DS_Store"),
    *("#recycle/a.png", "desktop.ini", ".hidden/deep/a.png", "$RECYCLE.BIN/a.png", "lost+found/a.png", "Icon\r"),
]
"""What systems and programs leave among people's files."""


def touch(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def names(source) -> list[str]:
    return sorted(item.source for task in range(source.tasks) for item in source.items(task).items)


def tarred(path: Path, members: Mapping[str, bytes] | list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in dict(members).items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def listed(path: Path, members, classes: int = 10) -> tuple[dict[str, int], dict[str, str], Listing]:
    """Labels of the images that are used and reasons of those that are not."""
    listing = TarSource(str(tarred(path, members)), class_names(classes)).items(0)
    cut = len(path.name) + 1
    return (
        {item.source[cut:]: item.label for item in listing.items},
        {image.file[cut:]: image.reason for image in listing.skipped},
        listing,
    )


@pytest.mark.parametrize("name", SERVICE)
@pytest.mark.parametrize("above", ["", "cat/", "cat/deeper/"])
def test_hidden_files_and_service_folders_are_no_class_and_no_image(tmp_path, above, name):
    for each in ("cat/1.png", "cat/deeper/2.png", "dog/3.png"):
        touch(tmp_path / each)
    touch(tmp_path / f"{above}{name}")
    source = FolderSource(tmp_path, 10, 0)
    assert source.classes == ("cat", "dog")
    assert names(source) == ["cat/1.png", "cat/deeper/2.png", "dog/3.png"]
    assert source.notes == ("1 hidden files and service folders (such as .DS_Store, __MACOSX) are left out",)
    assert [file for file, *_ in image_files(tmp_path)] == names(source)


@pytest.mark.parametrize("name", [each for each in SERVICE if each != "Icon\r"])
def test_the_same_in_tar_files(tmp_path, name):
    beside = "/".join([*name.split("/")[:-1], "._1.cls"])
    labels, skipped, listing = listed(
        tmp_path / "a.tar", [(name, b"x"), ("1.png", b"x"), (beside, b"x"), ("1.cls", b"4"), ("._2.png", b"x")]
    )
    assert (labels, skipped) == ({"1.png": 4}, {})
    assert [note.reason.split(" ")[0] for note in listing.notes] == ["3"]


def test_captions_beside_images_are_counted_in_a_line_and_are_no_broken_images(tmp_path):
    for number in range(3):
        for ending in ("JPG", "txt", "json", "caption.xml"):
            touch(tmp_path / "cat" / f"{number}.{ending}")
    touch(tmp_path / "cat" / "without_an_ending")
    source = FolderSource(tmp_path, 10, 0)
    assert names(source) == ["cat/0.JPG", "cat/1.JPG", "cat/2.JPG", "cat/without_an_ending"]
    assert source.skipped == ()
    assert source.notes == ("9 files without an image's name are left out: .xml (3), .json (3), .txt (3)",)


def test_a_class_without_images_is_told(tmp_path):
    touch(tmp_path / "cat" / "1.png")
    touch(tmp_path / "dog" / "1.txt")
    (tmp_path / "emu").mkdir()
    assert FolderSource(tmp_path, 10, 0).notes[-1] == (
        "2 of 3 classes have no images (they keep their labels): 'dog', 'emu'"
    )
    (tmp_path / "cat" / "1.png").unlink()
    with pytest.raises(UserError, match=r"3 class folders hold no images\. 1 files without .*: \.txt \(1\)"):
        FolderSource(tmp_path, 10, 0)


def test_only_regular_files_are_read(tmp_path):
    touch(tmp_path / "cat" / "1.png")
    os.mkfifo(tmp_path / "cat" / "fifo.png")
    os.mkfifo(tmp_path / "fifo")
    for name, target in (
        ("zero.png", "/dev/zero"),
        ("self.png", "self.png"),
        ("gone.png", "nowhere"),
        ("self", "self"),
    ):
        (tmp_path / "cat" / name).symlink_to(target)
    (tmp_path / "loop").symlink_to("loop")
    source = FolderSource(tmp_path, 10, 0)
    assert (source.classes, names(source)) == (("cat",), ["cat/1.png"])
    assert {image.file: image.reason.split(" (")[0] for image in source.skipped} == {
        **dict.fromkeys(("cat/fifo.png", "cat/zero.png"), "no regular file"),
        **dict.fromkeys(("cat/self.png", "cat/self", "cat/gone.png"), "a link that leads nowhere"),
        **dict.fromkeys(("fifo", "loop"), "lies in no class folder"),
    }
    for path in (tmp_path / "cat" / "fifo.png", Path("/dev/zero")):
        with pytest.raises(UserError, match=r"it cannot be read .*no regular file"):
            Item(0, "", str(path)).read()


def test_each_folder_is_visited_once_whatever_links_lead_there(tmp_path):
    """Forty folders, each with two links to the next: 2^40 paths."""
    for number in range(40):
        folder = tmp_path / "cat" / f"{number:02d}"
        touch(folder / "a.png")
        for name in ("left", "right"):
            (folder / name).symlink_to(f"../{(number + 1) % 40:02d}")
    (tmp_path / "cat" / "root").symlink_to(tmp_path)
    assert len(names(FolderSource(tmp_path, 100, 0))) == len(image_files(tmp_path / "cat")) == 40


@pytest.mark.parametrize("name", [b"caf\xe9", b"red\x1b[31m", b"two\nlines", "\u202eecho".encode()])
def test_names_of_classes_can_be_shown(tmp_path, name):
    touch(tmp_path / "cat" / "1.png")
    os.mkdir(os.path.join(os.fsencode(tmp_path), name))
    with pytest.raises(UserError, match=r"class folder '[ -~]*\\[ -~]*' is no UTF-8, or holds control.*: rename it"):
        FolderSource(tmp_path, 10, 0)


def test_names_of_images_are_shown_with_escapes(tmp_path):
    touch(tmp_path / "cat" / "1.png")
    with open(os.path.join(os.fsencode(tmp_path), b"cat/caf\xe9.png"), "wb") as file:
        file.write(b"content")
    items = FolderSource(tmp_path, 10, 0).items(0).items
    assert {item.source: item.read() for item in items} == {"cat/1.png": b"x", "cat/caf\\udce9.png": b"content"}


def test_classes_of_train_hold_for_other_splits(tmp_path):
    touch(tmp_path / "emu" / "1.png")
    source = FolderSource(tmp_path, 10, 0, WantedClasses.of_train(("cat", "dog", "emu")))
    assert [item.label for item in source.items(0).items] == [2]
    assert source.notes == ("2 of 3 classes have no images (they keep their labels): 'cat', 'dog'",)
    with pytest.raises(UserError, match="2 classes of the train split are called 'emu'"):
        FolderSource(tmp_path, 10, 0, WantedClasses.of_train(("emu", "dog", "emu")))
    touch(tmp_path / "yak" / "1.png")
    with pytest.raises(UserError, match="the train split has no class 'yak'"):
        FolderSource(tmp_path, 10, 0, WantedClasses.of_train(("cat", "dog", "emu")))


STEMS = st.text("ab.", min_size=1, max_size=4).map(lambda text: f"k{text}k")


@settings(max_examples=60, deadline=None)
@given(st.lists(STEMS, min_size=1, max_size=6, unique=True), st.sampled_from(["cls", "CLS", "json", "Json"]))
def test_every_image_of_a_tar_file_has_the_label_beside_it(tmp_path_factory, stems, ending):
    """Whatever dots are in its name: `track 2.01.png` belongs to `track 2.01.cls`."""
    members = []
    for number, stem in enumerate(sorted(stems)):
        label = str(number) if ending.lower() == "cls" else json.dumps({"label": number})
        members += [(f"{stem}.png", b"x"), (f"{stem}.{ending}", label.encode())]
    labels, skipped, _ = listed(tmp_path_factory.mktemp("tar") / "a.tar", members)
    assert labels == {f"{stem}.png": number for number, stem in enumerate(sorted(stems))}
    assert skipped == {}


def test_several_images_of_a_sample_are_all_used(tmp_path):
    labels, skipped, listing = listed(
        tmp_path / "a.tar",
        {"1.left.png": b"x", "1.right.JPEG": b"x", "1.cls": b"\xef\xbb\xbf 3\n", "2.txt": b"a", "2.jxl": b"x"},
    )
    assert (labels, skipped) == ({"1.left.png": 3, "1.right.JPEG": 3}, {})
    assert [note.reason for note in listing.notes] == [
        "2 files without an image's name are left out: .txt (1), .jxl (1)"
    ]


@pytest.mark.parametrize(
    ("ending", "content"),
    [
        *[("cls", each) for each in (b"", b"cat", b"3.9", b"\xff\xfe3", b"Infinity", b"9" * 5000, b"true")],
        *[
            ("json", each)
            for each in (b"", b"{}", b"[3]", b'{"label": Infinity}', b'{"label": NaN}', b"\xff", b"[" * 9999)
        ],
        *[("json", each) for each in (b'{"label": 3.9}', b'{"label": null}', b'{"label": true}', b'{"label": [3]}')],
    ],
)
def test_labels_that_are_none_are_told_as_such(tmp_path, ending, content):
    labels, skipped, _ = listed(
        tmp_path / "a.tar", {"1.png": b"x", f"1.{ending}": content, "2.png": b"x", "2.cls": b"2"}
    )
    assert labels == {"2.png": 2}
    assert skipped == {"1.png": f"its .{ending} holds no label, which is a whole number"}


def test_what_is_no_file_in_a_tar_file_is_counted(tmp_path):
    path = tarred(tmp_path / "a.tar", {"1.png": b"x", "1.cls": b"1"})
    with tarfile.open(path, "a") as tar:
        for name, kind in (("2.png", tarfile.SYMTYPE), ("3.png", tarfile.LNKTYPE), ("4.png", tarfile.FIFOTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "1.png"
            tar.addfile(link)
    listing = TarSource(str(path), class_names(2)).items(0)
    assert [item.source for item in listing.items] == ["a.tar/1.png"]
    assert {image.file: image.reason for image in listing.skipped} == {
        f"a.tar/{number}.png": "a link, or no regular file" for number in (2, 3, 4)
    }


def sized(field: bytes) -> bytes:
    """A header whose size is ``field``, with the right checksum."""
    header = bytearray(tarfile.TarInfo("2.png").tobuf())
    header[124:136] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize(
    "rest",
    [
        bytes(1024) + sized(b"00000000000\0"),
        sized(b"\xff" * 10 + b"\xfc\0"),
        sized(b"\xff" * 12),
        sized(b"77777777777\0"),
        b"x" * 512,
        b"x" * 100,
    ],
)
def test_what_comes_before_the_damage_of_a_tar_file_is_used(tmp_path, rest):
    path = tarred(tmp_path / "a.tar", {"1.png": b"x", "1.cls": b"1"})
    path.write_bytes(path.read_bytes()[:2048] + rest)
    listing = TarSource(str(path), class_names(2)).items(0)
    assert [item.source for item in listing.items] == ["a.tar/1.png"]
    assert [image.reason for image in listing.skipped if image.reason.startswith("the tar file is corrupt after ")]


@pytest.mark.parametrize("packed", ["gz", "bz2", "xz"])
def test_compressed_tar_files_are_refused_before_work(tmp_path, packed):
    path = tarred(tmp_path / "a.tar", {"1.png": b"x"}, f"w:{packed}")
    with pytest.raises(UserError, match=r"a\.tar is compressed with (gzip|bzip2|xz): unpack it"):
        TarSource(str(path), class_names(2))


def test_a_member_that_claims_too_much_is_not_read(tmp_path):
    path = tarred(tmp_path / "a.tar", {"1.png": gzip.compress(bytes(1000))})
    with pytest.raises(UnusableImageError, match="the tar file ends within it"):
        Item(0, "", str(path), (512, 100_000)).read()
    with pytest.raises(UnusableImageError, match="it has 1099511627776 bytes, at most"):
        Item(0, "", str(path), (512, 1 << 40)).read()


@pytest.mark.parametrize(
    "pattern", ["a{0..99999999}.tar", "{a..z}{a..z}{a..z}{a..z}.tar", "{0..999}{0..999}.tar", "a{.tar"]
)
def test_braces_that_stand_for_too_much_are_refused(tmp_path, pattern):
    with pytest.raises(UserError, match=r"stands for more than 100000 files|braces are written as in"):
        TarSource(f"{tmp_path}/{pattern}", class_names(2))


def test_lists_of_classes(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffcat\r\ncafé au lait\r\nemu\r\n\n".encode())
    assert class_names(str(path)) == ("cat", "café au lait", "emu")
    for content, message in (
        (b"cat\n\ndog", "line 2 is empty"),
        (b"", "line 1 is empty"),
        (b"cat\nd\x1bog", "line 2 holds control characters"),
        ("cat\ndog".encode("utf-16"), "is no text"),
        (bytes(range(256)), "is no text"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            class_names(str(path))


def test_a_name_is_one_class_however_its_accents_are_stored(tmp_path):
    composed, decomposed = "été", "e\u0301te\u0301"
    (tmp_path / decomposed).mkdir()
    (tmp_path / decomposed / "a.png").write_bytes(b"a")
    assert FolderSource(tmp_path, 10, 0).classes == (composed,)
    assert FolderSource(tmp_path, 10, 0, WantedClasses.of_train((composed, "b"))).tasks == 1
    (tmp_path / composed).mkdir()
    with pytest.raises(UserError, match=r"two class folders are called 'été'"):
        FolderSource(tmp_path, 10, 0)


def test_splits_are_no_classes(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        (tmp_path / split / "cat" / "a.png").write_bytes(b"a")
    with pytest.raises(UserError, match=r"holds splits \(train, val\), not classes: .*source=.*/train"):
        FolderSource(tmp_path, 10, 0)
    for split in ("train", "val"):  # the classes of somebody with trains
        (tmp_path / split / "a.png").write_bytes(b"a")
    assert FolderSource(tmp_path, 10, 0).classes == ("train", "val")


def test_names_in_other_cases_and_images_in_other_formats_are_told(tmp_path):
    for name in ("Cat", "cat"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(b"a")
    (tmp_path / "cat" / "b.HEIC").write_bytes(b"b")
    source = FolderSource(tmp_path, 10, 0)
    assert any("1 class names differ only in upper and lower case" in note for note in source.notes)
    assert [(item.file, "convert it to JPEG" in item.reason) for item in source.skipped] == [("cat/b.HEIC", True)]
