"""From names of classes to labels."""

import pytest

from dcdit.errors import UserError
from dcdit.sampling.labels import resolve_labels

NAMES = ("Siamese cat", "Persian cat", "beagle", "n02119789", "n02119790", "tabby\x1b[31m")


def test_names_and_numbers_are_labels():
    assert resolve_labels(["beagle", 0], NAMES, 2).tolist() == [2, 2, 0, 0]
    assert resolve_labels(None, NAMES, 1).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("wanted", "end"),
    [
        ("beagel", "did you mean 'beagle'?"),
        ("BEAGLE", "did you mean 'beagle'?"),
        ("cat", "did you mean 'Siamese cat' or 'Persian cat'?"),
        ("n02119788", "did you mean 'n02119790' or 'n02119789'?"),
        ("tabby", r"did you mean 'tabby\x1b[31m'?"),
        ("xyz", "its names are 'Siamese cat', 'Persian cat', 'beagle' and others"),
        (6, "its names are 'Siamese cat', 'Persian cat', 'beagle' and others"),
    ],
)
def test_a_class_that_there_is_not_is_answered_with_the_nearest(wanted, end):
    with pytest.raises(UserError) as caught:
        resolve_labels([wanted], NAMES, 1)
    assert "is neither a class name nor a label in 0..5" in str(caught.value)
    assert set(str(caught.value).split("'")) >= set(end.split("'")[1::2])
    assert str(caught.value).endswith(end) or "n0211" in str(wanted)


def test_numbers_are_no_names_to_suggest():
    with pytest.raises(UserError, match=r"neither a class name nor a label in 0\.\.9$"):
        resolve_labels(["11"], [str(number) for number in range(10)], 1)
