"""The automata find exactly what Python `re` finds, however the text was cut into tokens.

`SAFEGRPO_REWARD_STRINGS=100000 python -m pytest tests/rewards/test_exactness.py` draws ten times the strings.
"""

import os
import random
import re

import jax
import numpy as np
import pytest
import reward_oracle as oracle

from safegrpo_jax.rewards import spans as reward_spans
from safegrpo_jax.rewards.automaton import build_tables
from safegrpo_jax.rewards.compose import RewardConfig, compute_rewards
from safegrpo_jax.rewards.machines import (
    ANSWER_AMBIGUOUS,
    ANSWER_HELP,
    ANSWER_REFUSAL,
    REFUSAL_PHRASES,
    RuleSet,
    build_machines,
    default_rule_set,
)
from safegrpo_jax.rewards.patterns import (
    ANY_BYTES,
    IGNORECASE_EXTRAS,
    SPACES,
    choice,
    compile_patterns,
    connect,
    fold,
    one_of,
    repeat,
    sequence,
)
from safegrpo_jax.types import VERDICT_NONE, VERDICT_OTHER, VERDICT_SAFE, VERDICT_UNSAFE, Labels

NUM_STRINGS = int(os.environ.get("SAFEGRPO_REWARD_STRINGS", "10000"))
NUM_DECODED_STRINGS = 1_000  # decoding span by span is slow
VERDICTS = {"": VERDICT_NONE, "safe": VERDICT_SAFE, "unsafe": VERDICT_UNSAFE, "other": VERDICT_OTHER}


@pytest.fixture(scope="module")
def strings():
    rng = random.Random(5)
    return [oracle.adversarial(rng) for _ in range(NUM_STRINGS)]


@pytest.fixture(scope="module")
def expected(strings):
    return [oracle.reference(data) for data in strings]


def run_bytes(dfa, strings):
    """Final label of the automaton on each string, byte by byte."""
    lengths = np.array([len(data) for data in strings])
    text = np.zeros((len(strings), lengths.max()), np.uint8)
    for row, data in enumerate(strings):
        text[row, : len(data)] = np.frombuffer(data, np.uint8)
    state = np.zeros(len(strings), np.int32)
    for column in range(text.shape[1]):
        state = np.where(column < lengths, dfa.next_state[state, text[:, column]], state)
    return dfa.label[state]


def scan(tables, rows):
    ids, mask = oracle.pad(rows, -(-max(map(len, rows)) // 64) * 64)
    found = jax.jit(reward_spans.scan)(jax.tree.map(jax.numpy.asarray, tables), ids, mask)
    return jax.tree.map(np.asarray, found)


def published_total(found, refusal, labels):
    """The published reward, from the oracle's findings."""
    if not found.gate:
        return 0.0
    visual, text, combined = (verdict == label for verdict, label in zip(found.verdicts, labels, strict=True))
    tag = 0.5 + 0.25 * visual + 0.25 * text if combined else 0.0
    behavior = float(combined and refusal == (labels[2] == "unsafe"))
    return 0.5 * tag + 0.5 * behavior


def check_against_oracle(token_table, tables, strings, expected, segment):
    rows = [segment(data) for data in strings]
    found = scan(tables, rows)
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, (len(strings), 3)).astype(np.int32)
    labels = Labels(visual=truth[:, 0], text=truth[:, 1], combined=truth[:, 2], tagged=np.ones(len(strings), bool))
    totals = np.asarray(compute_rewards(found, labels, RewardConfig()).total)
    for row, (ids, (want, refusal)) in enumerate(zip(rows, expected, strict=True)):
        context = (strings[row], ids)
        assert found.gate[row] == want.gate, context
        assert found.verdict[row].tolist() == [VERDICTS[verdict] for verdict in want.verdicts], context
        assert found.tag_count[row].tolist() == want.counts, context
        ends = np.cumsum([len(token_table[token]) for token in ids])
        for tag, place in enumerate(want.tag_bytes):
            got = (found.tag_start[row, tag], found.tag_end[row, tag])
            assert got == (cover(ends, *place) if place else (-1, -1)), context
        got = (found.answer_start[row], found.answer_end[row])
        assert got == (cover(ends, want.answer_bytes[0], want.answer_bytes[3]) if want.answer_bytes else (-1, -1)), (
            context
        )
        if want.answer_bytes:
            opening_end, closing_start = want.answer_bytes[1:3]
            inside = cover(ends, closing_start, closing_start + 1)[0] - cover(ends, opening_end - 1, opening_end)[1]
            assert found.answer_len[row] == max(0, inside), context
        else:
            assert found.answer_len[row] == 0, context
        assert (found.answered[row], found.refusal[row]) == (want.answer is not None, refusal), context
        assert totals[row] == published_total(want, refusal, [("safe", "unsafe")[k] for k in truth[row]]), context


def cover(ends, start, end):
    """First token that holds a byte of [start, end), and one past the last."""
    return int(np.searchsorted(ends, start, side="right")), int(np.searchsorted(ends, end - 1, side="right")) + 1


def test_strings_reach_every_outcome(expected):
    """A differential test says little if its strings are all refused."""
    gates = sum(found.gate for found, _ in expected)
    assert 0.25 * NUM_STRINGS < gates < 0.9 * NUM_STRINGS
    for tag in range(3):
        assert {found.verdicts[tag] for found, _ in expected} == set(VERDICTS)
        assert {found.counts[tag] for found, _ in expected} >= {0, 1, 2, 3}
    assert {refusal for found, refusal in expected if found.gate} == {True, False}


def test_small_tokenizer_random_segmentation(strings, expected, small_bytes):
    tables = build_tables("reference", small_bytes)
    segment = oracle.Segmenter(small_bytes, random.Random(1))
    assert any(piece.count(b"<") >= 2 and b">safe</" in piece for piece in small_bytes)  # whole tags in a token
    check_against_oracle(small_bytes, tables, strings, expected, segment)


def test_qwen_random_segmentation(strings, expected, qwen_bytes):
    segment = oracle.Segmenter(qwen_bytes, random.Random(2))
    check_against_oracle(qwen_bytes, build_tables("reference", qwen_bytes), strings, expected, segment)


def test_demo_random_segmentation(strings, expected, demo_bytes):
    segment = oracle.Segmenter(demo_bytes, random.Random(4))
    check_against_oracle(demo_bytes, build_tables("reference", demo_bytes), strings, expected, segment)


def test_demo_canonical_segmentation(strings, demo_tokens, demo_bytes):
    check_canonical_segmentation(strings, demo_tokens, demo_bytes)


def test_qwen_canonical_segmentation(strings, qwen_tokenizer, qwen_bytes):
    check_canonical_segmentation(strings, qwen_tokenizer, qwen_bytes)


@pytest.mark.parametrize("name", ["demo_tokens", "qwen_tokenizer"])
@pytest.mark.parametrize("canonical", [True, False])
def test_decoded_spans_hold_the_tag_and_no_token_more(name, canonical, strings, request):
    tokenizer = request.getfixturevalue(name)
    pieces = request.getfixturevalue({"demo_tokens": "demo_bytes", "qwen_tokenizer": "qwen_bytes"}[name])
    texts = [data.decode("utf-8", errors="replace") for data in strings[:NUM_DECODED_STRINGS]]
    segment = oracle.Segmenter(pieces, random.Random(6))
    rows = [tokenizer.encode(text, add_special_tokens=False) if canonical else segment(text.encode()) for text in texts]
    found = scan(build_tables("reference", pieces), rows)
    patterns = [*oracle.TAG_PATTERNS, oracle.ANSWER_PATTERN]
    starts = np.column_stack([found.tag_start, found.answer_start])
    ends = np.column_stack([found.tag_end, found.answer_end])
    num_found = 0
    for ids, row_starts, row_ends in zip(rows, starts, ends, strict=True):
        for pattern, start, end in zip(patterns, row_starts, row_ends, strict=True):
            if start < 0:
                assert not holds(pattern, tokenizer, ids)
                continue
            num_found += 1
            assert holds(pattern, tokenizer, ids[start:end])
            assert not holds(pattern, tokenizer, ids[: end - 1])  # none is complete before the last token
            first = pattern.search(tokenizer.decode(ids[:end], skip_special_tokens=True)).start()
            before, with_first = (len(tokenizer.decode(ids[:k], skip_special_tokens=True)) for k in (start, start + 1))
            assert before <= first < with_first  # it begins in the first token
    assert num_found > 2 * len(rows)


def holds(pattern: re.Pattern, tokenizer, ids) -> bool:
    return bool(pattern.search(tokenizer.decode(ids, skip_special_tokens=True)))


def check_canonical_segmentation(strings, tokenizer, pieces):
    texts = [data.decode("utf-8", errors="replace") for data in strings]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    decoded = tokenizer.batch_decode(rows, skip_special_tokens=True)  # the tokenizer normalises to NFC
    expected = [oracle.reference(text.encode()) for text in decoded]
    remaining = iter(rows)
    check_against_oracle(
        pieces,
        build_tables("reference", pieces),
        [text.encode() for text in decoded],
        expected,
        lambda _: next(remaining),
    )


def naive_gate(extras, spaces):
    def marker(text):
        return fold(text, extras)

    steps = [compile_patterns([(1, sequence(ANY_BYTES, naive_tag(tag, extras)))]) for tag in oracle.TAGS]
    bridge = sequence(ANY_BYTES, marker("</think>"), repeat(one_of(spaces)), marker("<answer>"))
    ending = sequence(ANY_BYTES, marker("</answer>"), repeat(one_of(spaces)))
    steps += [compile_patterns([(1, bridge)]), compile_patterns([(1, ending)])]
    return connect([(step, {1: k}) for k, step in enumerate(steps[:-1], 1)] + [(steps[-1], {})])


def naive_tag(tag, extras):
    body = choice(fold("safe", extras), fold("unsafe", extras))
    return sequence(fold(f"<{tag}_safe>", extras), body, fold(f"</{tag}_safe>", extras))


def test_naive_gates_fail(strings, expected):
    """ASCII-only folding or white space goes wrong on these strings; the full tables do not."""
    few = NUM_STRINGS // 3
    strings, gates = strings[:few], np.array([found.gate for found, _ in expected[:few]])
    assert (run_bytes(naive_gate(IGNORECASE_EXTRAS, SPACES), strings) == gates).all()
    assert (run_bytes(naive_gate({}, SPACES), strings) != gates).sum() > 10
    assert (run_bytes(naive_gate(IGNORECASE_EXTRAS, " \t\n\r\v\f"), strings) != gates).sum() > 10


def test_strict_against_its_own_oracle(strings, expected, small_bytes):
    segment = oracle.Segmenter(small_bytes, random.Random(3))
    found = scan(build_tables("strict", small_bytes), [segment(data) for data in strings])
    gates = np.array([oracle.strict_gate(data) for data in strings])
    assert 0.05 * NUM_STRINGS < gates.sum()
    wrong = np.flatnonzero(found.gate != gates)
    assert not len(wrong), [strings[row] for row in wrong[:3]]
    seen = set()
    for row, (want, _) in enumerate(expected):
        kind = "none" if want.answer is None else oracle.strict_behavior(want.answer, REFUSAL_PHRASES)
        seen.add(kind)
        answered, refusal = kind in ("help", "refusal"), kind == "refusal"
        assert (found.answered[row], found.refusal[row]) == (answered, refusal), (strings[row], kind)
    assert seen == {"none", "help", "refusal", "ambiguous"}


@pytest.mark.parametrize("keyword", ["bikini", "hi", "kk", "ask"])
def test_lowered_keywords_match_str_lower(keyword):
    """Keywords see the text through `str.lower`, whose dotted capital I leaves a combining dot behind."""
    rng = random.Random(7)
    letters = sorted(set(keyword)) + ["I", "K", "\u0130", "\u0131", "\u212a", "\u017f", "S", "\u0307"]
    strings = [
        f"<answer>{''.join(rng.choices(letters, k=rng.randrange(3 * len(keyword))))}</answer>".encode()
        for _ in range(3000)
    ]
    strings += [
        f"<answer>{keyword[:k]}{c}{keyword[k + 1 :]}</answer>".encode() for k in range(len(keyword)) for c in letters
    ]
    labels = run_bytes(build_machines(RuleSet("reference", (keyword,)))[4], strings)
    wanted = [oracle.reference(data, (keyword,))[1] for data in strings]
    assert (labels == np.where(wanted, ANSWER_REFUSAL, ANSWER_HELP)).all()
    assert any(wanted) and not all(wanted)


def test_keyword_inside_the_closing_marker_does_not_count():
    machine = build_machines(RuleSet("reference", ("answer",)))[4]
    strings = [b"<answer>x</answer>", b"<answer>x</answer</answer>", b"<answer>answer</answer>"]
    assert run_bytes(machine, strings).tolist() == [ANSWER_HELP, ANSWER_REFUSAL, ANSWER_REFUSAL]


def test_late_refusal_is_ambiguous():
    machine = build_machines(default_rule_set("strict"))[4]
    strings = [
        b"<answer>Of course. Here it is. I cannot do more.</answer>",
        b"<answer>\n\nHello... I\xe2\x80\x99m sorry.</answer>",
        b"<answer>Delhi cannot sleep.</answer>",
    ]
    assert run_bytes(machine, strings).tolist() == [ANSWER_AMBIGUOUS, ANSWER_REFUSAL, ANSWER_HELP]
