"""Texts from elsewhere on their way to a terminal."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qf.pipeline.formatting import plain, plain_lines

ANYTHING = st.text(st.characters(codec=None, categories=None), max_size=60) | st.lists(
    st.sampled_from(
        ["\x1b[31m", "\x1b]0;title\x07", "\x9b1m", "\x1b", "\u202e", "\n", "\r", "\udcff", "\ud800", "a", " "]
    )
).map("".join)


def obeyed(character):
    """Whether a terminal would do something else than print a character."""
    joiner = character in "\u200c\u200d"  # emoji and Persian need them
    return (
        unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        or character in "\u202a\u202e\u2066\u2069"
        or (
            unicodedata.bidirectional(character) in ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI")
            and not joiner
        )
    )


@given(ANYTHING)
def test_a_text_becomes_one_line_that_a_terminal_does_not_obey(text):
    line = plain(text)
    assert not any(map(obeyed, line))
    assert plain(line) == line
    line.encode()
    assert not any(map(obeyed, plain_lines(text).replace("\n", "")))
    assert plain_lines(text).count("\n") == text.count("\n")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a \x1b[1;31mred\x1b[0m dog", "a red dog"),
        ("\x1b]0;another title\x07a dog", "a dog"),
        ("\x1b]8;;https://example.org\x1b\\a link\x1b]8;;\x1b\\", "a link"),
        ("\x9b31mred", "red"),
        ("two\n lines\tand\r\n tabs ", "two lines and tabs"),
        ("a\x00b\x07", "a\\x00b\\x07"),
        ("gpj.\u202egod", "gpj.\\u202egod"),
        ("caf\udce9.jpg", "caf\\xe9.jpg"),  # a file name in Latin-1
        ("half \ud83d", "half \\ud83d"),
        ("犬 और 👩‍👧 é", "犬 और 👩‍👧 é"),
    ],
)
def test_escape_sequences_go_and_other_control_characters_are_shown(text, line):
    assert plain(text) == line


@given(st.text(max_size=300), st.integers(3, 50))
def test_a_long_text_keeps_its_beginning_and_its_end(text, limit):
    line, whole = plain(text, limit), plain(text, 10_000)
    assert len(line) <= limit
    assert line == whole or (line[0], line[-1]) == (whole[0], whole[-1])
