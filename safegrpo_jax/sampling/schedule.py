"""What the host decides while rollouts are decoded: which prompts are prefilled when and where, which slots stay.

Integers on the host, no arrays of the model. All numbers are per shard and count within it. Prompts are taken in
order, a prompt's samples one after another, so that a prefix is held for a short time. Every process computes the same
from the same reports.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

# Prefixes held per prompt's worth of slots. Stragglers keep prefixes of prompts whose other samples have ended: at 1
# they leave 40% of the slots busy on lengths as skewed as published ones, at 2 80%, at 3 99%.
PREFIX_RESERVE = 3


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes per shard: prompts of the batch, decode slots, prefixes held, prompts of one prefill call."""

    num_shards: int
    num_prompts: int
    num_slots: int
    num_prefixes: int
    num_prefills: int


def lay_out(
    num_prompts: int, num_shards: int, group_size: int, *, num_slots: int, num_prefixes: int, prefill_batch: int
) -> Layout:
    """Divides a batch and its sizes (all of the whole mesh, 0 chooses) over the shards.

    Raises:
      ValueError: a number that the shards do not divide.
    """
    for name, count in (
        ("a batch of prompts", num_prompts),
        ("sampling.num_slots", num_slots),
        ("sampling.num_prefixes", num_prefixes),
        ("sampling.prefill_batch", prefill_batch),
    ):
        if count % num_shards:
            raise ValueError(f"{name} = {count} does not divide into the {num_shards} data-parallel parts of the mesh")
    prompts = num_prompts // num_shards
    slots = min(num_slots // num_shards or prompts * group_size, prompts * group_size)
    groups = -(-slots // group_size)
    all_at_once = slots == prompts * group_size
    prefixes = num_prefixes // num_shards or (prompts if all_at_once else PREFIX_RESERVE * groups)
    prefixes = min(prefixes, prompts)
    prefills = prefill_batch // num_shards or (prefixes if prefixes == prompts else groups)
    return Layout(num_shards, prompts, slots, prefixes, min(prefills, prefixes))


class Prefixes:
    """Which prompts of each shard are held where, from the first report to the last.

    `ready_rows` [z]: rollouts below have their prompt held, or had it. `places` [z prompts]: where it is held.
    """

    def __init__(self, layout: Layout, group_size: int):
        self._layout = layout
        self._group_size = group_size
        self._owners = np.full((layout.num_shards, layout.num_prefixes), -1)
        self._num_prefilled = np.zeros(layout.num_shards, np.int32)
        self._next_row = np.zeros(layout.num_shards, np.int32)
        self.places = np.zeros((layout.num_shards, layout.num_prompts), np.int32)

    @property
    def ready_rows(self) -> Int[np.ndarray, "z"]:
        return self._num_prefilled * np.int32(self._group_size)

    @property
    def num_prefilled(self) -> int:
        """Prompts prefilled so far, in all shards."""
        return int(self._num_prefilled.sum())

    @property
    def nothing_waits(self) -> bool:
        """Every rollout has begun."""
        return bool((self._next_row == self._layout.num_prompts * self._group_size).all())

    def due(self) -> Iterator[tuple[Int[np.ndarray, "z q"], Int[np.ndarray, "z q"]]]:
        """Prefill calls to make now: prompts, and the places they go to; numbers past the end mean none.

        A call waits until one shard can fill it, or has slots but no prompt for them.
        """
        layout = self._layout
        while True:
            left = layout.num_prompts - self._num_prefilled
            counts = np.minimum(np.minimum(left, layout.num_prefills), (self._owners < 0).sum(axis=1))
            starved = self._next_row == self.ready_rows
            if not ((counts > 0) & (starved | (counts == np.minimum(left, layout.num_prefills)))).any():
                return
            prompts = np.full((layout.num_shards, layout.num_prefills), layout.num_prompts, np.int32)
            places = np.full(prompts.shape, layout.num_prefixes, np.int32)
            for shard, count in enumerate(counts):
                here = np.arange(count)
                prompts[shard, :count] = self._num_prefilled[shard] + here
                places[shard, :count] = np.flatnonzero(self._owners[shard] < 0)[:count]
                self._owners[shard, places[shard, :count]] = prompts[shard, :count]
                self.places[shard, prompts[shard, :count]] = places[shard, :count]
            self._num_prefilled = self._num_prefilled + counts.astype(np.int32)
            yield prompts, places

    def release(self, slot_rows: Int[np.ndarray, "z slots"], next_row: Int[np.ndarray, "z"]) -> None:
        """Notes which rollouts are in work and begun; the place of a prompt without any left becomes free."""
        self._next_row = next_row
        for owners, rows, begun in zip(self._owners, slot_rows, next_row, strict=True):
            in_work = np.isin(owners, rows // self._group_size)
            owners[(owners >= 0) & ((owners + 1) * self._group_size <= begun) & ~in_work] = -1


def slots_to_keep(
    slot_rows: Int[np.ndarray, "z slots"], num_rows: int, min_slots: int
) -> Int[np.ndarray, "z kept"] | None:
    """Half of each shard's slots, the busy ones first, if that holds them all and leaves `min_slots`; else None."""
    busy = slot_rows < num_rows
    half = busy.shape[1] // 2
    if min_slots == 0 or half * len(busy) < min_slots or busy.sum(axis=1).max() > half:
        return None
    return np.argsort(~busy, axis=1, kind="stable")[:, :half].astype(np.int32)
