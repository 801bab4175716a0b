"""Folds and white space over every code point, and the combinators against Python `re`."""

import itertools
import re
import string
import sys

import numpy as np
import pytest

from safegrpo_jax.rewards.patterns import (
    ANY_BYTES,
    IGNORECASE_EXTRAS,
    LOWER_EXTRAS,
    SPACES,
    choice,
    compile_patterns,
    connect,
    constant,
    literal,
    minimize,
    one_of,
    optional,
    repeat,
    sequence,
)

CHARACTERS = [chr(point) for point in range(sys.maxunicode + 1)]


def run(dfa, data):
    state = 0
    for byte in data:
        state = dfa.next_state[state, byte]
    return int(dfa.label[state])


@pytest.mark.parametrize("letter", string.ascii_lowercase)
def test_ignorecase_over_all_code_points(letter):
    """`(?i:letter)` matches its two ASCII forms and exactly the extras."""
    found = set(re.findall(letter, "".join(CHARACTERS), re.IGNORECASE))
    assert found == {letter, letter.upper(), *IGNORECASE_EXTRAS.get(letter, "")}


def test_lower_over_all_code_points():
    """Characters whose lower case holds an ASCII letter: the capitals, the extras, and the dotted I (i and a dot)."""
    found = {(c, c.lower()) for c in CHARACTERS if set(c.lower()) & set(string.ascii_lowercase)}
    extras = {(spelling, letter) for letter, spellings in LOWER_EXTRAS.items() for spelling in spellings}
    ascii_letters = {(c, c.lower()) for c in string.ascii_letters}
    assert found == ascii_letters | extras | {("\u0130", "i\u0307")}


def test_spaces_over_all_code_points():
    assert set(SPACES) == {c for c in CHARACTERS if c.isspace()} == set(re.findall(r"\s", "".join(CHARACTERS)))
    assert len(SPACES) == 29


def test_combinators_against_re():
    """All strings up to length 6 over three letters."""
    ab = choice(literal("ab"), literal("c"))
    pairs = [
        (r"(ab|c)*a?", sequence(repeat(ab), optional(literal("a")))),
        (r".*(ab|c)b", sequence(ANY_BYTES, ab, literal("b"))),
        (r"(a*b)*c", sequence(repeat(sequence(repeat(literal("a")), literal("b"))), literal("c"))),
        (r"(|a*)(b|cc)", sequence(choice(sequence(), repeat(literal("a"))), choice(literal("b"), literal("cc")))),
    ]
    for expression, pattern in pairs:
        dfa = compile_patterns([(1, pattern)])
        for length in range(7):
            for letters in itertools.product("abc", repeat=length):
                text = "".join(letters)
                assert run(dfa, text.encode()) == bool(re.fullmatch(expression, text)), (expression, text)


def test_first_listed_label_wins():
    dfa = compile_patterns([(2, sequence(ANY_BYTES, literal("ab"))), (1, ANY_BYTES)])
    assert [run(dfa, data) for data in (b"", b"xab", b"ab ")] == [1, 2, 1]


def test_characters_need_all_their_bytes():
    dfa = compile_patterns([(1, sequence(one_of("\u017f\u2028"), literal("x")))])
    assert run(dfa, "\u017fx".encode()) == run(dfa, "\u2028x".encode()) == 1
    assert not any(run(dfa, data) for data in (b"\xc5x", b"\xe2\x80x", b"\xc5\xbf\xbfx", b"x"))


def test_connect_goes_on_at_the_first_match_and_stops_dead():
    search = compile_patterns([(1, sequence(ANY_BYTES, literal("b"))), (2, sequence(ANY_BYTES, literal("c")))])
    chain = connect([(search, {1: 1}), (search, {1: 2, 2: 3}), (constant(5), {}), (constant(6), {})], [7, 8, 0, 0])
    cases = {b"": 7, b"a": 7, b"ab": 8, b"abab": 5, b"bcccb": 6, b"c": 0, b"cbb": 0}
    assert {data: run(chain, data) for data in cases} == cases
    with pytest.raises(ValueError, match="empty string"):
        connect([(compile_patterns([(1, ANY_BYTES)]), {1: 1}), (constant(1), {})])


def test_minimal_automata_are_canonical():
    """Two spellings of one language give identical tables."""
    one = compile_patterns([(1, sequence(choice(literal("xa"), literal("xb")), ANY_BYTES))])
    two = compile_patterns([(1, sequence(literal("x"), one_of("ba"), repeat(ANY_BYTES)))])
    assert np.array_equal(one.next_state, two.next_state) and np.array_equal(one.label, two.label)
    assert np.array_equal(minimize(one).next_state, one.next_state)
    assert len(one.label) == 4  # start, after x, matched, dead
