"""Where the tokens of a batch of rollouts go when rows hold several of them: a plan of index arrays, made on the host.

Owns the choice of rows and microbatches, and the arrays; gathers nothing and runs no model. Lengths are known once the
rollouts are sampled, so rows of one fixed length are filled with whole rollouts (best fit), a fixed number of rows is a
microbatch, and padding is what is left over. Where prompts are shared, a row holds a prompt once for all of its
responses that lie in that row. Shapes come from short ladders; blocks that a ladder adds are empty and are skipped.

Two orders of filling are tried. By prompt: the rollouts of a prompt stay together, so its images are encoded in few
microbatches. By length: denser. The second is taken only where it saves a microbatch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from safegrpo_jax.data.packing import ladder
from safegrpo_jax.types import PATCHES_PER_FEATURE, Packing

ANSWER_STEPS = 4  # the room for answers is one of so many parts of a row, all of them equal


@dataclasses.dataclass(frozen=True)
class PackingConfig:
    """Rows that hold several rollouts; `row_len` 0 leaves every rollout a padded row of its own.

    `row_len`: tokens of a row, at least the longest prompt and completion together. `rows`: rows of a microbatch, over
    the whole mesh. `share_prompts`: responses of one prompt that lie in one row share the prompt's tokens; with padded
    rows all responses of a prompt do.

    Raises:
      ValueError: sizes that make no sense.
    """

    row_len: int = 0
    rows: int = 16
    share_prompts: bool = False

    def __post_init__(self):
        if self.row_len < 0 or self.row_len % ANSWER_STEPS:
            raise ValueError(f"packing row_len is {self.row_len}; use a multiple of {ANSWER_STEPS}, or 0 for none")
        if self.rows < 1:
            raise ValueError(f"packing rows is {self.rows}; use a number >= 1")


class Row(NamedTuple):
    """One packed row: its rollouts in order, prompt by prompt."""

    rollouts: list[int]
    room: int


def pack_rollouts(
    prompt_len: Int[np.ndarray, "b"],
    completion_len: Int[np.ndarray, "n"],
    prompt_width: int,
    image_rows: Sequence[Sequence[int]],
    num_image_rows: int,
    config: PackingConfig,
    num_minibatches: int = 1,
    num_shards: int = 1,
) -> Packing:
    """The packing of a batch whose rollout r continues prompt r // (n // b).

    `prompt_width` is the padded length of the (left-padded) prompts, `image_rows[b]` the packing rows of patches that
    prompt b uses, of `num_image_rows`; prompts and packing rows are cut into `num_minibatches` contiguous blocks, as
    `update.split_prompts` does. Sizes that are spread over devices are multiples of `num_shards`. Rollouts without a
    token are left out.

    Raises:
      ValueError: a rollout longer than a row, or sizes that do not divide.
    """
    num_prompts, group = len(prompt_len), len(completion_len) // len(prompt_len)
    if config.rows % num_shards:
        raise ValueError(f"packing rows is {config.rows}; make it a multiple of the {num_shards} parts of a batch")
    if num_prompts % num_minibatches or num_image_rows % num_minibatches:
        raise ValueError(f"{num_prompts} prompts, {num_image_rows} packing rows: {num_minibatches} must divide them")
    longest = int((np.repeat(prompt_len, group) + completion_len).max())
    if longest > config.row_len:
        raise ValueError(f"a rollout of {longest} tokens does not fit a row; set packing.row_len to at least as many")
    prompts, images = num_prompts // num_minibatches, num_image_rows // num_minibatches
    minibatches = []
    for index in range(num_minibatches):
        part = slice(index * prompts, (index + 1) * prompts)
        lengths = prompt_len[part], completion_len[part.start * group : part.stop * group]
        needed = [[row - index * images for row in rows] for rows in image_rows[part]]
        minibatches.append((*lengths, _choose_rows(*lengths, config), needed))
    num_blocks = ladder(max(-(-len(rows) // config.rows) for *_, rows, _ in minibatches))
    blocks = []
    for prompt_part, completion_part, rows, needed in minibatches:
        plans = [_place_row(row, prompt_part, completion_part, prompt_width, config) for row in rows]
        for index in range(num_blocks):
            block = slice(index * config.rows, (index + 1) * config.rows)
            blocks.append((plans[block], sorted({u for row in rows[block] for r in row for u in needed[r // group]})))
    return _stack(blocks, config, images, num_shards)


def image_rows_of(
    vision_mask: Bool[np.ndarray, "b p"], feature_index: Int[np.ndarray, "b p"], num_patches: int
) -> list[list[int]]:
    """The packing rows, of `num_patches` patches each, that the images of each prompt lie in."""
    rows = feature_index // (num_patches // PATCHES_PER_FEATURE)
    return [np.unique(row[is_vision]).tolist() for row, is_vision in zip(rows, vision_mask, strict=True)]


def count_tokens(packing: Packing) -> tuple[int, int]:
    """(real, processed): tokens that are no padding, and those of all rows of the blocks that are computed."""
    used = packing.rollout_mask.any(-1)
    return int((packing.segment_ids > 0).sum()), int(used.sum()) * packing.segment_ids[0].size


def _choose_rows(prompt_len, completion_len, config: PackingConfig) -> list[list[int]]:
    """Rollouts of every row, rows in the order of their prompts."""
    group = len(completion_len) // len(prompt_len)
    rollouts = np.flatnonzero(completion_len)
    total = completion_len + np.repeat(prompt_len, group)
    by_prompt = rollouts[np.lexsort((-total[rollouts], rollouts // group))]
    by_length = rollouts[np.argsort(-total[rollouts], kind="stable")]
    rows, dense = (_fill(order, prompt_len, completion_len, config) for order in (by_prompt, by_length))
    if -(-len(dense) // config.rows) < -(-len(rows) // config.rows):
        rows = dense
    rows = [sorted(row) for row in rows]
    return sorted(rows, key=lambda row: (sum(r // group for r in row) / len(row), row))


def _fill(order, prompt_len, completion_len, config: PackingConfig) -> list[list[int]]:
    """Best fit: each rollout goes where it costs the fewest tokens, then where it leaves the least room."""
    group = len(completion_len) // len(prompt_len)
    rows: list[list[int]] = []
    room = np.zeros(len(order), np.int64)
    holds = np.zeros((len(order), len(prompt_len)), bool)  # row, prompt
    for rollout in order:
        prompt, count = rollout // group, len(rows)
        held = holds[:count, prompt] & config.share_prompts
        left = room[:count] - completion_len[rollout] - np.where(held, 0, prompt_len[prompt])
        fits = np.flatnonzero(left >= 0)
        if len(fits):
            row = fits[np.lexsort((left[fits], ~held[fits]))[0]]
            room[row] = left[row]
        else:
            row = count
            rows.append([])
            room[row] = config.row_len - completion_len[rollout] - prompt_len[prompt]
        rows[row].append(int(rollout))
        holds[row, prompt] = True
    return rows


class _RowPlan(NamedTuple):
    """The arrays of one row, and (rollout, place of its first answer token among the row's answers)."""

    rollout: np.ndarray
    column: np.ndarray
    segment_ids: np.ndarray
    prefix_ids: np.ndarray
    state_place: np.ndarray
    answer_place: np.ndarray
    firsts: list[tuple[int, int]]


def _place_row(rollouts, prompt_len, completion_len, prompt_width: int, config: PackingConfig) -> _RowPlan:
    """Writes the segments of a row one after another: a prompt, then the responses that continue it."""
    group = len(completion_len) // len(prompt_len)
    pieces, states, answers, firsts = [], [], [], []
    place = num_answers = segment = prefix = 0
    last_prompt = None
    for rollout in rollouts:
        prompt, length = rollout // group, int(completion_len[rollout])
        columns = prompt_width + np.arange(length)
        if prompt != last_prompt or not config.share_prompts:
            segment, last_prompt = segment + 1, prompt
            prefix, shown = segment, int(prompt_len[prompt])
            pieces.append((rollout, prompt_width - shown + np.arange(shown), segment, prefix))
            place += shown
            prompt_end = place - 1
        if config.share_prompts:
            segment += 1
        pieces.append((rollout, columns, segment, prefix))
        answers.append(place + np.arange(length))
        states.append(np.concatenate([[prompt_end], answers[-1][:-1]]))
        firsts.append((rollout, num_answers))
        place, num_answers = place + length, num_answers + length
    counts = [len(piece[1]) for piece in pieces]
    rollout, segment_ids, prefix_ids = (np.repeat([piece[i] for piece in pieces], counts) for i in (0, 2, 3))
    column = np.concatenate([piece[1] for piece in pieces])
    return _RowPlan(rollout, column, segment_ids, prefix_ids, np.concatenate(states), np.concatenate(answers), firsts)


def _stack(blocks, config: PackingConfig, num_image_rows: int, num_shards: int) -> Packing:
    """All blocks as arrays of one shape."""

    def most(counts):
        return max(max(counts, default=0), 1)

    step = config.row_len // ANSWER_STEPS
    num_answers = -(-most(len(plan.answer_place) for plans, _ in blocks for plan in plans) // step) * step
    num_used = -(-ladder(most(len(images) for _, images in blocks)) // num_shards) * num_shards
    num_members = ladder(most(sum(len(plan.firsts) for plan in plans) for plans, _ in blocks))

    def zeros(*shape, dtype=np.int32):
        return np.zeros((len(blocks), *shape), dtype)

    tokens = {name: zeros(config.rows, config.row_len) for name in ("rollout", "column", "segment_ids", "prefix_ids")}
    places = {name: zeros(config.rows, num_answers) for name in ("state_place", "answer_place")}
    answer_mask = zeros(config.rows, num_answers, dtype=bool)
    image_rows, image_slots = zeros(num_used), zeros(num_image_rows)
    rollouts, first_answer, rollout_mask = zeros(num_members), zeros(num_members), zeros(num_members, dtype=bool)
    for index, (plans, images) in enumerate(blocks):
        image_rows[index, : len(images)] = images
        image_slots[index, images] = np.arange(len(images))
        members = []
        for row, plan in enumerate(plans):
            for name, array in (tokens | places).items():
                values = getattr(plan, name)
                array[index, row, : len(values)] = values
            answer_mask[index, row, : len(plan.answer_place)] = True
            members += [(rollout, row * num_answers + first) for rollout, first in plan.firsts]
        if members:
            rollouts[index, : len(members)], first_answer[index, : len(members)] = np.transpose(members)
            rollout_mask[index, : len(members)] = True
    return Packing(
        **tokens,
        **places,
        answer_mask=answer_mask,
        image_rows=image_rows,
        image_slots=image_slots,
        rollouts=rollouts,
        rollout_mask=rollout_mask,
        first_answer=first_answer,
    )
