"""Texts that a config looks for, and answers that it lists, against Python on decoded text, for any segmentation."""

import random

import jax
import numpy as np
import pytest
import reward_oracle as oracle

from safegrpo_jax.rewards import spans as reward_spans
from safegrpo_jax.rewards.automaton import build_tables
from safegrpo_jax.rewards.machines import KeywordSet, RuleSet, build_machines, normalize_answer

NUM_STRINGS = 2_000
LISTED = ("A", "b", "not a", "safe", "42")
RULES = RuleSet(
    keyword_sets=(
        KeywordSet(("kilo", "hi", "step 1"), "answer"),
        KeywordSet(("road", "think>"), "completion"),
        KeywordSet(("sorry",), "completion"),
    ),
    answers=LISTED,
)
BODIES = [
    "A", " a ", "B.", "b . ", "b..", "not a", "Not  A", "NOT A.\n", "\u2003safe\u3000", "\u017fafe", "safe\u200b", "42",
    "4 2", "", ".", "A</answer", "<answer>A", "step 1", "STEP 1", "\u212ailo", "KILO", "h\u0130", "HI", "h\u0131",
    "a road", "4", "2",
]  # fmt: skip


def answer_string(rng: random.Random) -> bytes:
    parts = ["a ROAD " if rng.random() < 0.3 else "text ", "<answer>", rng.choice(BODIES), rng.choice(["", "", "!"])]
    parts += ["</answer>"] * (rng.random() < 0.9) + [rng.choice(["", " sorry", "<answer>A</answer>"])]
    return "".join(parts).encode()


def wanted(data: bytes) -> list[int]:
    """The outcomes of the added machines, by Python."""
    text = data.decode("utf-8", errors="replace")
    match = oracle.ANSWER_PATTERN.search(text)
    answer = match.group(1) if match else None
    first = int(answer is not None and any(word in answer.lower() for word in RULES.keyword_sets[0].texts))
    rest = [int(any(word in text.lower() for word in keywords.texts)) for keywords in RULES.keyword_sets[1:]]
    names = [normalize_answer(name) for name in LISTED]
    number = 1 + names.index(normalize_answer(answer)) if answer and normalize_answer(answer) in names else 0
    return [first, *rest, number]


@pytest.fixture(scope="module")
def strings():
    rng = random.Random(3)
    return [answer_string(rng) if number % 2 else oracle.adversarial(rng) for number in range(NUM_STRINGS)]


@pytest.mark.parametrize("name", ["small_bytes", "demo_bytes", "qwen_bytes"])
def test_outcomes_equal_python(name, strings, request):
    pieces = request.getfixturevalue(name)
    segment = oracle.Segmenter(pieces, random.Random(8))
    rows = [segment(data) for data in strings]
    ids, mask = oracle.pad(rows)
    found = np.asarray(jax.jit(reward_spans.scan)(build_tables(RULES, pieces), ids, mask).added_outcomes)
    expected = np.array([wanted(data) for data in strings])
    wrong = np.flatnonzero((found != expected).any(1))
    assert not len(wrong), [(strings[row], found[row], expected[row]) for row in wrong[:3]]
    assert set(expected[:, -1]) == {0, *range(1, len(LISTED) + 1)} and (expected[:, :-1].mean(0) > 0.02).all()


def test_added_machines_leave_the_published_ones_alone(strings, small_bytes):
    segment = oracle.Segmenter(small_bytes, random.Random(8))
    ids, mask = oracle.pad([segment(data) for data in strings])
    plain, added = (
        jax.jit(reward_spans.scan)(build_tables(rules, small_bytes), ids, mask) for rules in (RuleSet(), RULES)
    )
    for field in set(plain.__dataclass_fields__) - {"added_outcomes"}:
        np.testing.assert_array_equal(getattr(plain, field), getattr(added, field), err_msg=field)


def test_machines_come_in_the_documented_order():
    machines = build_machines(RULES)
    assert len(machines) == 5 + 3 + 1
    assert [set(machine.label.tolist()) for machine in machines[5:]] == [{0, 1}] * 3 + [set(range(len(LISTED) + 1))]


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ({"keyword_sets": (KeywordSet(("caf\u00e9",), "answer"),)}, "keyword 'café' cannot be matched"),
        ({"keyword_sets": (KeywordSet(("a<b",), "answer"),)}, "without '<'"),
        ({"keyword_sets": (KeywordSet((), "answer"),)}, "there is no keyword"),
        ({"keyword_sets": (KeywordSet(("x",), "prompt"),)}, "use 'answer' or 'completion'"),
        ({"keyword_sets": (KeywordSet(("x" * 513,), "answer"),)}, "513 characters in all"),
        ({"answers": ("A", "a")}, "hold one twice"),
        ({"answers": ("A ",)}, "no outer white space or final period"),
        ({"answers": ("yes.",)}, "no outer white space or final period"),
        ({"answers": ("\u00e9",)}, "ASCII"),
        (
            {"answers": tuple(a + b for a in "abcdefghijklmnop" for b in "abcdefghijklmnop")},
            "256 listed answers, over 255",
        ),
    ],
)
def test_impossible_texts_are_refused(rules, reason):
    with pytest.raises(ValueError, match=reason):
        RuleSet(**rules)
