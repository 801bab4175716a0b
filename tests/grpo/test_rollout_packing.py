"""The plan of packed rows, by what it promises: every token once, in order, in a row that holds it."""

import json
from pathlib import Path

import numpy as np
import pytest

from safegrpo_jax.grpo.packing import PackingConfig, count_tokens, pack_rollouts

TRACE = Path(__file__).parents[1] / "data" / "length_trace.json"
WIDTH = 24  # of the padded prompts


def random_batch(seed, num_prompts=12, group=4, longest=40):
    rng = np.random.default_rng(seed)
    prompt_len = rng.integers(3, WIDTH + 1, num_prompts)
    completion_len = rng.integers(0, longest + 1, num_prompts * group)
    image_rows = [sorted({3 * (b // 3) + int(u) for u in rng.integers(0, 3, b % 3)}) for b in range(num_prompts)]
    return prompt_len, completion_len, WIDTH, image_rows, num_prompts


def segments_of(packing, block, row):
    """(rollout, columns, the segments it may see) of each segment of a row."""
    ids = packing.segment_ids[block, row]
    for segment in range(1, ids.max() + 1):
        where = ids == segment
        (rollout,) = set(packing.rollout[block, row][where].tolist())
        yield rollout, packing.column[block, row][where].tolist(), set(packing.prefix_ids[block, row][where].tolist())


@pytest.mark.parametrize("share", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize(("num_minibatches", "rows"), [(1, 4), (4, 2)])
def test_every_token_has_one_place(share, num_minibatches, rows):
    prompt_len, completion_len, *_ = batch = random_batch(0)
    packing = pack_rollouts(*batch, PackingConfig(64, rows, share), num_minibatches)
    num_blocks, per_batch = len(packing.rollout) // num_minibatches, len(completion_len) // num_minibatches
    seen = []
    for block in range(len(packing.rollout)):
        first = block // num_blocks * per_batch
        prompts = {}  # (row, segment number) of the prompts, by what they show
        for row in range(rows):
            real = packing.segment_ids[block, row] > 0
            assert real[: real.sum()].all(), "padding comes last"
            for number, (rollout, columns, visible) in enumerate(segments_of(packing, block, row), start=1):
                rollout += first
                prompt = list(range(WIDTH - prompt_len[rollout // 4], WIDTH))
                answer = list(range(WIDTH, WIDTH + completion_len[rollout]))
                if not share:
                    assert columns == prompt + answer and visible == {number}
                elif columns == prompt:
                    assert visible == {number} and (row, rollout // 4) not in prompts
                    prompts[row, rollout // 4] = number
                    continue
                else:
                    assert columns == answer and visible == {prompts[row, rollout // 4]}
                seen.append(rollout)
    assert sorted(seen) == np.flatnonzero(completion_len).tolist()


@pytest.mark.parametrize("share", [False, True], ids=["separate", "shared"])
def test_answers_are_predicted_by_the_token_before_them(share):
    prompt_len, completion_len, *_ = batch = random_batch(1)
    packing = pack_rollouts(*batch, PackingConfig(64, 4, share))
    num_answers = packing.answer_mask.shape[-1]
    assert packing.answer_mask.sum() == completion_len.sum()
    for block in range(len(packing.rollout)):
        for member in np.flatnonzero(packing.rollout_mask[block]):
            rollout = packing.rollouts[block, member]
            row, first = divmod(int(packing.first_answer[block, member]), num_answers)
            for number in range(completion_len[rollout]):
                state, answer = (
                    getattr(packing, name)[block, row, first + number] for name in ("state_place", "answer_place")
                )
                assert packing.answer_mask[block, row, first + number]
                assert packing.rollout[block, row, answer] == rollout
                assert packing.column[block, row, answer] == WIDTH + number
                assert packing.rollout[block, row, state] // 4 == rollout // 4
                assert packing.column[block, row, state] == WIDTH + number - 1
                seen = {packing.segment_ids[block, row, answer], packing.prefix_ids[block, row, answer]}
                assert packing.segment_ids[block, row, state] in seen


def test_blocks_hold_the_images_of_their_prompts():
    *_, image_rows, num_image_rows = batch = random_batch(2)
    packing = pack_rollouts(*batch, PackingConfig(64, 2), num_minibatches=4, num_shards=2)
    num_blocks = len(packing.rollout) // 4
    assert packing.image_rows.shape[1] % 2 == 0
    for block in range(len(packing.rollout)):
        first = block // num_blocks
        for rollout in packing.rollouts[block][packing.rollout_mask[block]]:
            for image_row in image_rows[first * 3 + rollout // 4]:
                image_row -= first * num_image_rows // 4
                assert packing.image_rows[block, packing.image_slots[block, image_row]] == image_row


def test_shapes_come_from_a_short_ladder():
    shapes = set()
    for seed in range(40):
        packing = pack_rollouts(*random_batch(seed, longest=5 + seed), PackingConfig(72, 2), num_minibatches=2)
        shapes.add((packing.rollout.shape, packing.answer_mask.shape))
    assert len(shapes) <= 12
    assert all(shape[0] // 2 in (1, 2, 3, 4, 6, 8, 12, 16) for shape, _ in shapes)


def test_an_empty_block_counts_no_tokens():
    batch = np.full(5, 4), np.full(5, 4), 4, [[]] * 5, 5
    packing = pack_rollouts(*batch, PackingConfig(8, 1))
    assert len(packing.rollout) == 6 and not packing.rollout_mask[5].any()  # five blocks; the ladder has six
    assert count_tokens(packing) == (40, 40)


@pytest.fixture(scope="module")
def trace():
    """2048 rollouts of 256 prompts: the lengths of a heavy-tailed run, prompts of 1024 tokens."""
    lengths = np.array(json.loads(TRACE.read_text())["lengths"])
    return np.full(256, 1024), lengths, 1024, [[b] for b in range(256)], 256


@pytest.mark.parametrize("num_minibatches", [1, 4])
def test_token_efficiency_on_the_stored_trace(trace, num_minibatches):
    packing = pack_rollouts(*trace, PackingConfig(6144, 16), num_minibatches, num_shards=16)
    real, processed = count_tokens(packing)
    assert real == trace[0].sum() * 8 + trace[1].sum()
    padded = len(trace[1]) * (1024 + 4096)
    print(f"token efficiency {real / processed:.3f} in {num_minibatches} mini-batches; padded {real / padded:.3f}")
    assert real / processed >= 0.90
    assert real / padded < 0.45


def test_shared_prompts_need_fewer_microbatches(trace):
    separate, shared = (
        int(pack_rollouts(*trace, PackingConfig(6144, 16, share)).rollout_mask.any(-1).sum()) for share in (False, True)
    )
    print(f"{separate} microbatches, {shared} with shared prompts")
    assert shared <= 0.7 * separate


def test_refusals():
    batch = random_batch(3)
    with pytest.raises(ValueError, match="row_len is 62; use a multiple of 4"):
        PackingConfig(62)
    with pytest.raises(ValueError, match="rows is 0"):
        PackingConfig(64, 0)
    with pytest.raises(ValueError, match="does not fit a row; set packing.row_len"):
        pack_rollouts(*batch, PackingConfig(48, 4))
    with pytest.raises(ValueError, match="rows is 3; make it a multiple of the 2"):
        pack_rollouts(*batch, PackingConfig(64, 3), num_shards=2)
    with pytest.raises(ValueError, match="5 must divide"):
        pack_rollouts(*batch, PackingConfig(64, 4), num_minibatches=5)
