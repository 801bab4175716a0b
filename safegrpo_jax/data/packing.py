"""Index arithmetic of a batch: image tokens and M-RoPE positions of a prompt, places of images in packing rows.

Owns the numbers only: no pixels, no text, no state. The one idea: an image has one place in the sequence (a run of
equal tokens) and one in the packed patches (row and offset); all that the model gathers follows from these two.

Source: position rules of Qwen3-VL as of huggingface/transformers 5.23 (behaviour only).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from safegrpo_jax.data.images import MERGE_SIZE


class ExpandedPrompt(NamedTuple):
    """One prompt without padding. `positions` are on the axes (time, height, width)."""

    token_ids: Int[np.ndarray, "p"]
    vision_mask: Bool[np.ndarray, "p"]
    positions: Int[np.ndarray, "3 p"]
    rope_delta: int


def expand_images(token_ids: Sequence[int], image_token_id: int, grids: Sequence[tuple[int, int]]) -> ExpandedPrompt:
    """Replaces each image token by one per merged patch and numbers the positions.

    Text counts up on all axes. An image keeps the time of its start, spreads its rows and columns from there, and the
    text after it goes on at start + max(rows, columns). `rope_delta` is the highest position + 1 - number of tokens,
    usually negative. Example: 3 text tokens, an image of 4 x 6 patches, 1 text token:
      time   0 1 2  3 3 3 3 3 3  6
      height 0 1 2  3 3 3 4 4 4  6
      width  0 1 2  3 4 5 3 4 5  6    rope_delta = 7 - 10 = -3
    `grids` are in patches (height, width), in the order of the image tokens.

    Raises:
      ValueError: the number of image tokens is not the number of grids.
    """
    given = np.asarray(token_ids, np.int32)
    pads = np.flatnonzero(given == image_token_id).tolist()
    if len(pads) != len(grids):
        raise ValueError(f"{len(pads)} image tokens in the prompt for {len(grids)} images; check the chat template")
    ids, positions, start = [], [], 0
    for text, grid in zip(_split_at(given, pads), [*grids, (0, 0)], strict=True):
        rows, columns = grid[0] // MERGE_SIZE, grid[1] // MERGE_SIZE
        ids += [text, np.full(rows * columns, image_token_id, np.int32)]
        positions.append(np.broadcast_to(np.arange(start, start + len(text), dtype=np.int32), (3, len(text))))
        start += len(text)
        positions.append(start + np.indices((1, rows, columns), dtype=np.int32).reshape(3, -1))
        start += max(rows, columns)
    expanded = np.concatenate(ids)
    return ExpandedPrompt(
        expanded, expanded == image_token_id, np.concatenate(positions, axis=1), start - len(expanded)
    )


def _split_at(values: np.ndarray, places: list[int]) -> list[np.ndarray]:
    """The runs between `places`, without the values at them: one run more than places."""
    starts, ends = [0, *(place + 1 for place in places)], [*places, len(values)]
    return [values[start:end] for start, end in zip(starts, ends, strict=True)]


def pack_images(
    counts: Sequence[Sequence[int]], num_blocks: int, row_size: int
) -> tuple[list[list[tuple[int, int]]], int]:
    """Places images of `counts[prompt][image]` patches into rows of `row_size`: first fit, in order.

    Prompts form `num_blocks` equal, contiguous blocks; each fills rows of its own, and all blocks get the same number
    of rows (at least 1), rounded up on the ladder 1, 2, 3, 4, 6, 8, 12, 16 ... so that few shapes occur. Returns
    (row, offset) of each image and the rows per block.

    Raises:
      ValueError: an image larger than a row, or blocks that do not divide the prompts.
    """
    if len(counts) % num_blocks:
        raise ValueError(f"{len(counts)} prompts do not divide into {num_blocks} blocks")
    largest = max((count for row in counts for count in row), default=0)
    if largest > row_size:
        raise ValueError(f"an image of {largest} patches does not fit a row of {row_size}")
    prompts_per_block = len(counts) // num_blocks
    used: list[list[int]] = [[] for _ in range(num_blocks)]
    places = [
        [_first_fit(used[prompt // prompts_per_block], count, row_size) for count in prompt_counts]
        for prompt, prompt_counts in enumerate(counts)
    ]
    rows_per_block = ladder(max(1, *map(len, used)))
    first_rows = [prompt // prompts_per_block * rows_per_block for prompt in range(len(counts))]
    shifted = [
        [(first + row, offset) for row, offset in prompt_places]
        for first, prompt_places in zip(first_rows, places, strict=True)
    ]
    return shifted, rows_per_block


def _first_fit(used: list[int], count: int, row_size: int) -> tuple[int, int]:
    """Takes `count` patches from the first row with room, or from a new one."""
    for row, filled in enumerate(used):
        if filled + count <= row_size:
            used[row] += count
            return row, filled
    used.append(count)
    return len(used) - 1, 0


def ladder(count: int) -> int:
    """`count`, at least 1, rounded up on 1, 2, 3, 4, 6, 8, 12, 16 ..."""
    power = 1 << (count - 1).bit_length()
    three_quarters = power * 3 // 4
    return three_quarters if power >= 4 and count <= three_quarters else power


def share_of(size: int, share: tuple[int, int]) -> slice:
    """The contiguous part of a batch of `size` rows that feeder `share[0]` of `share[1]` encodes."""
    index, count = share
    return slice(size * index // count, size * (index + 1) // count)


def smallest_bucket(buckets: Sequence[int], size: int) -> int:
    """The first of the ascending `buckets` that holds `size`.

    Raises:
      ValueError: `size` exceeds them all.
    """
    for bucket in buckets:
        if size <= bucket:
            return bucket
    raise ValueError(f"size {size} exceeds the largest bucket {buckets[-1]}")
