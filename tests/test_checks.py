"""Values in messages: one line, of bounded length, that no terminal acts on."""

import time

from hypothesis import given
from hypothesis import strategies as st

from dcdit.checks import LONGEST_SHOWN, shown, visible

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
