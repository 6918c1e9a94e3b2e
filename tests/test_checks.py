"""Values in messages: one line, of bounded length, that no terminal acts on; and what a message names as allowed."""

import time
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcdit.checks import FLOAT_NAMES, LONGEST_SHOWN, Capacity, Count, Meant, conform, shown, visible
from dcdit.errors import UserError

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(PLAIN)
def test_any_value_is_shown_on_one_bounded_line(value):
    text = shown(value)
    assert 0 < len(text) <= LONGEST_SHOWN
    assert text == visible(text)
    text.encode()


def test_what_is_huge_or_shared_is_shown_at_once():
    shared: list = []
    for _ in range(40):
        shared = [shared, shared]
    began = time.monotonic()
    for value in (shared, "a" * 10**8, 1 << 10**6, {n: n for n in range(10**6)}, [[]] * 10**7):
        assert len(shown(value)) <= LONGEST_SHOWN
    assert time.monotonic() - began < 10


@given(st.text(st.characters(codec="utf-8") | st.sampled_from("\x1b\u202e\u2028\udce9\n")))
def test_visible_text_steers_no_terminal(text):
    seen = visible(text)
    assert not set(seen) & set("\x1b\u202e\u2028\udce9\n\r\x07")
    seen.encode()
    assert visible("café 数字 می‌خواهم") == "café 数字 می‌خواهم"


@pytest.mark.parametrize(
    ("hint", "allowed", "refused"),
    [
        (Literal["auto"] | Count | None, ["auto", 3, None], ["foo", 0, True, 1.5]),
        (Count | Literal["auto", "most"], ["auto", "most", 3], ["foo", 0, True]),
        (Literal["auto"] | Capacity | None, ["auto", 0.4, None], ["foo", 0, 2, True]),
        (Literal["auto"] | bool, ["auto", True, False], ["foo", 1]),
    ],
)
def test_a_message_about_one_of_several_kinds_names_the_words_that_are_allowed(hint, allowed, refused):
    for value in allowed:
        assert conform("key", value, hint) == value
    words = [shown(value).strip("'") for value in allowed if value is None or isinstance(value, str)]
    for value in refused:
        with pytest.raises(UserError, match=r"^key=.* \(allowed too: ") as caught:
            conform("key", value, hint)
        assert str(caught.value).endswith(f"(allowed too: {', '.join(words)})")


def test_parts_of_a_list_are_told_without_what_the_whole_may_be():
    with pytest.raises(UserError, match=r"^key=0 is not a positive number$"):
        conform("key", [0], list[Count] | None)


@pytest.mark.parametrize(("given_", "meant"), [("bf16-mixed", "bf16"), ("32-true", "fp32"), (32, "fp32")])
def test_a_choice_that_others_call_differently_is_suggested(given_, meant):
    hint = Annotated[Literal["auto", "fp32", "bf16"], FLOAT_NAMES]
    with pytest.raises(UserError, match=rf"is not one of auto, fp32, bf16: did you mean {meant}\?$"):
        conform("precision", given_, hint)
    with pytest.raises(UserError, match=r"is not one of auto, fp32, bf16$"):
        conform("precision", "half", hint)
    assert conform("precision", "bf16", Annotated[Literal["bf16"], Meant({"bf16": "fp32"})]) == "bf16"
