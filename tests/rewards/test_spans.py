"""One step function, however it is driven: scanned, carried, split, padded, batched, sharded."""

import dataclasses
import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reward_oracle as oracle
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from safegrpo_jax.rewards import spans as reward_spans
from safegrpo_jax.rewards.automaton import build_tables
from safegrpo_jax.rewards.machines import ANSWER_AMBIGUOUS, ANSWER_HELP, ANSWER_REFUSAL, KeywordSet, RuleSet

NUM_STRINGS = 64


@pytest.fixture(scope="module")
def tables(small_bytes):
    rules = RuleSet(keyword_sets=(KeywordSet(("help",), "completion"),), answers=("help", "x"))
    return jax.tree.map(jnp.asarray, build_tables(rules, small_bytes))


@pytest.fixture(scope="module")
def batch(small_bytes):
    rng = random.Random(11)
    segment = oracle.Segmenter(small_bytes, rng)
    return oracle.pad([segment(oracle.adversarial(rng)) for _ in range(NUM_STRINGS)])


@pytest.fixture(scope="module")
def scanned(tables, batch):
    found = jax.jit(reward_spans.scan)(tables, *batch)
    assert np.asarray(found.gate).any() and (np.asarray(found.tag_count) > 1).any()
    return found


def assert_same(first, second):
    for name, one, two in zip(first.__dataclass_fields__, jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two), err_msg=name)


def test_carried_state_equals_scan_at_any_split(tables, batch, scanned):
    ids, mask = map(jnp.asarray, batch)
    step = jax.jit(reward_spans.step)
    state = reward_spans.init_state(tables, NUM_STRINGS)
    for column in range(ids.shape[1]):
        state = step(tables, state, ids[:, column], mask[:, column])
    assert_same(reward_spans.finish(tables, state), scanned)


def test_inactive_rows_keep_their_state(tables, batch):
    ids = jnp.asarray(batch[0])
    state = reward_spans.init_state(tables, NUM_STRINGS)
    for column in range(5):
        state = reward_spans.step(tables, state, ids[:, column], jnp.ones(NUM_STRINGS, bool))
    assert_same(reward_spans.step(tables, state, ids[:, 6], jnp.zeros(NUM_STRINGS, bool)), state)


def test_padding_needs_no_mask_when_it_has_no_bytes(small_tokenizer, tables, batch, scanned):
    """Tokens after the end that add no text change nothing but the count of tokens."""
    ids, mask = batch
    padded = np.where(mask, ids, small_tokenizer.pad_token_id)
    assert_same(reward_spans.scan(tables, padded, np.ones_like(mask)), scanned)


def test_any_split_equals_the_whole(tables, batch, scanned):
    ids, mask = batch
    cuts = sorted(np.random.default_rng(0).choice(np.arange(1, ids.shape[1]), 3, replace=False).tolist())
    state = reward_spans.init_state(tables, NUM_STRINGS)
    for start, end in itertools.pairwise([0, *cuts, ids.shape[1]]):
        state = jax.jit(reward_spans.advance)(tables, state, ids[:, start:end], mask[:, start:end])
    assert_same(reward_spans.finish(tables, state), scanned)


def test_numpy_reference(tables, batch, scanned):
    """Every field of each row by walking the tables in plain Python, token by token."""
    host = jax.tree.map(np.asarray, tables)
    for row, (ids, mask) in enumerate(zip(*batch, strict=True)):
        assert walk(host, ids[mask].tolist()) == {
            name: np.asarray(getattr(scanned, name))[row].tolist() for name in scanned.__dataclass_fields__
        }


def walk(tables, ids):
    """What `RewardTables` says of its entries, taken literally: positions of all `<` instead of the last two."""
    states, opens = tables.first_row.astype(int), []
    verdict, start, end, count = [0] * 3, [-1] * 3, [-1] * 3, [0] * 3
    answer_start = inside = answer_end = -1
    answer_len = 0
    for index, token in enumerate(ids):
        entries = tables.transitions[states, tables.token_class[token]].astype(int)
        states = entries % 2**reward_spans.STATE_BITS + tables.first_row
        events = (entries >> reward_spans.STATE_BITS).tolist()
        for tag, event in enumerate(events[1:4]):
            count[tag] += event >> 4
            if event & 3 and not verdict[tag]:
                before = opens + [index] * (event >> 2 & 3)
                verdict[tag], start[tag], end[tag] = event & 3, before[-2], index + 1
        opened, closed = events[4] & 3, events[4] >> 2
        if opened:
            answer_start, inside = index if opened == 2 else opens[-1], index + 1
        if closed:
            answer_end = index + 1
            answer_len = max(0, (index if closed == 2 else (opens + [index] * events[0])[-1]) - inside)
        opens += [index] * events[0]
    outcome = tables.outcome[states].tolist()
    closed = outcome[4] >= ANSWER_HELP
    return {
        "gate": outcome[0] == 1, "verdict": verdict, "tag_start": start, "tag_end": end, "tag_count": count,
        "answer_start": answer_start if closed else -1, "answer_end": answer_end,
        "answered": closed and outcome[4] != ANSWER_AMBIGUOUS, "refusal": outcome[4] == ANSWER_REFUSAL,
        "answer_len": answer_len, "added_outcomes": outcome[5:],
    }  # fmt: skip


def test_tags_inside_one_token():
    """Whole tags, two tags, and a tag behind another tag's end in one token; indices by hand."""
    pieces = [b"<text_safe>safe</text_safe><text_safe>", b"unsafe", b"</text_safe><", b"answer></", b"answer>", b"<x<"]
    pieces.append(b"")
    tables = build_tables("reference", pieces)
    ids = np.array([[5, 0, 1, 2, 3, 4], [6, 5, 0, 1, 2, 5], [0, 1, 2, 6, 3, 4]], np.int32)
    found = reward_spans.scan(tables, ids, np.ones(ids.shape, bool))
    assert found.tag_count[:, 1].tolist() == [2, 2, 2]
    assert found.tag_start[:, 1].tolist() == [1, 2, 0] and found.tag_end[:, 1].tolist() == [2, 3, 1]
    assert found.answer_start.tolist() == [3, -1, 2] and found.answer_end.tolist() == [6, -1, 6]
    assert found.answer_len.tolist() == [0, 0, 0] and found.answered.tolist() == [True, False, True]
    assert not found.refusal.any()


def test_vmap_equals_batch(tables, batch, scanned):
    ids, mask = map(jnp.asarray, batch)
    single = jax.vmap(lambda i, m: jax.tree.map(lambda leaf: leaf[0], _scan_row(tables, i, m)))(ids, mask)
    assert_same(dataclasses.replace(scanned, **{n: getattr(single, n) for n in scanned.__dataclass_fields__}), scanned)


def _scan_row(tables, ids, mask):
    return reward_spans.scan(tables, ids[None], mask[None])


def test_sharded_over_rollouts_without_collectives(tables, batch, scanned):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    program = jax.jit(reward_spans.scan, in_shardings=(whole, rows, rows), out_shardings=rows).lower(tables, *batch)
    compiled = program.compile()
    text = compiled.as_text()
    for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert collective not in text
    ids, mask = jax.device_put(batch, rows)
    assert_same(compiled(jax.device_put(tables, whole), ids, mask), scanned)


def test_shard_map_equals_batch(tables, batch, scanned):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("data")
    sharded = jax.shard_map(reward_spans.scan, mesh=mesh, in_specs=(PartitionSpec(), rows, rows), out_specs=rows)
    assert_same(jax.jit(sharded)(tables, *map(jnp.asarray, batch)), scanned)


def test_work_does_not_depend_on_what_is_read(tables):
    """A repetitive completion costs what any other does: the program has no branch and one loop, over the columns."""
    program = str(jax.make_jaxpr(reward_spans.scan)(tables, np.zeros((4, 32), np.int32), np.ones((4, 32), bool)))
    assert program.count("scan[") == 1 and "length=32" in program
    assert "while[" not in program and "cond[" not in program
