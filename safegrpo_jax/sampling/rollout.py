"""Rollouts: g sampled completions per prompt with their behaviour log-probabilities and reward spans.

Randomness belongs to (key, record, sample, token): every draw is keyed by these four alone, so neither the order
of the prompts nor the number of slots, the refills, the split into batches or the mesh changes a token.
`Sampler` joins the programs of `sampling/decode.py`; between their calls the host only decides which prompts are
prefilled next, from a few integers that all processes see alike (`sampling/schedule.py`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int

from safegrpo_jax.rewards import spans as reward_spans
from safegrpo_jax.sampling import cache as cache_lib
from safegrpo_jax.sampling.cache import PrivateCache
from safegrpo_jax.sampling.decode import (
    DecodeSettings,
    DecodeState,
    ModelFunctions,
    Queue,
    decode_chunk,
    init_state,
)
from safegrpo_jax.sampling.logits import choose_tokens, gumbel_noise
from safegrpo_jax.sampling.schedule import Layout, Prefixes, lay_out, slots_to_keep
from safegrpo_jax.sharding import batch_axis, replicate
from safegrpo_jax.types import Array, ArrayTree, Key, Params, Prompts, Rollouts


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn, and in how many slots. Counts are of the whole mesh; 0 chooses.

    `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off. `num_slots`: rollouts decoded at a time; a slot whose
    rollout has ended takes the next one. `num_prefixes`: prompts held at a time, `prefill_batch`: prompts prefilled at
    a time. `decode_chunk`: steps between two looks of the host. `cache_buckets`: sizes that the private cache grows
    through before it holds `max_new_tokens`. `min_slots`: once nothing waits, the slots are halved, down to this
    number, whenever half of them are idle; 0 never does.
    """

    group_size: int = 8
    max_new_tokens: int = 4096
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    num_slots: int = 0
    num_prefixes: int = 0
    prefill_batch: int = 0
    decode_chunk: int = 64
    cache_buckets: tuple[int, ...] = ()
    min_slots: int = 0

    def __post_init__(self):
        sizes = ("num_slots", "num_prefixes", "prefill_batch", "min_slots")
        for name, ok, remedy in (
            ("group_size", self.group_size >= 1, "at least 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or positive"),
            ("top_k", self.top_k >= 0, "0 (off) or positive"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("decode_chunk", self.decode_chunk >= 1, "at least 1"),
            *((name, getattr(self, name) >= 0, "0 (chosen) or positive") for name in sizes),
            ("cache_buckets", list(self.cache_buckets) == sorted(set(self.cache_buckets)), "ascending"),
            ("cache_buckets", all(size >= 1 for size in self.cache_buckets), "positive"),
        ):
            if not ok:
                raise ValueError(f"sampling.{name} is {getattr(self, name)}; it must be {remedy}")

    @property
    def column_ladder(self) -> tuple[int, ...]:
        """Numbers of private columns, ascending. The last token of a rollout is never fed and needs none, but in other
        than multiples of 8 a TPU lays the columns out across its tiles and copies the whole cache in every call."""
        largest = -(-max(1, self.max_new_tokens - 1) // 8) * 8
        return (*(size for size in self.cache_buckets if size < largest), largest)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the sampler's arrays live: `batch_axes` of the mesh spread slots, prompts and rollouts, `head_axis` (if
    any) the key heads."""

    mesh: Mesh
    batch_axes: tuple[str, ...]
    head_axis: str | None = None

    @property
    def num_shards(self) -> int:
        return int(np.prod([self.mesh.shape[name] for name in self.batch_axes]))

    @property
    def rows(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(self.batch_axes))

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def heads(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(self.batch_axes, self.head_axis))

    def place_inputs(self, prompts: Prompts, key: Key) -> tuple[Prompts, Key]:
        """Brings a batch from the trainer's mesh: prompts to their shards, images to all devices where they divide."""
        return jax.device_put((prompts, key), (self.prompt_shardings(prompts), self.replicated))

    def prompt_shardings(self, prompts: Prompts) -> Prompts:
        """Where `place_inputs` brings each array."""
        everywhere = self.mesh.axis_names if len(prompts.images.patches) % self.mesh.size == 0 else self.batch_axes
        image_rows = NamedSharding(self.mesh, PartitionSpec(everywhere))

        def place(path, leaf):
            return image_rows if path[0].name == "images" else self._batch_rows(path)

        return jax.tree_util.tree_map_with_path(place, prompts)

    def feature_shardings(self, features: ArrayTree) -> ArrayTree:
        """Of vision tokens, in packing order, over the shards: prompts find their own in their shard."""
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: self._batch_rows(path) if leaf.ndim else self.replicated, features
        )

    def _batch_rows(self, path: jax.tree_util.KeyPath) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*[None] * batch_axis(path), self.batch_axes))

    def constrain(self, tree: ArrayTree) -> ArrayTree:
        """Inside jit: arrays where `shardings` says."""
        return jax.lax.with_sharding_constraint(tree, self.shardings(tree))

    def shardings(self, tree: ArrayTree) -> ArrayTree:
        """Arrays spread over the shards, those of keys and values (four axes) over their heads too, scalars
        replicated."""
        return jax.tree.map(
            lambda leaf: self.heads if leaf.ndim == 4 else self.rows if leaf.ndim else self.replicated, tree
        )


class Sampler:
    """The jitted programs of sampling, and `generate`, which calls them until every rollout has ended.

    In the order of their calls: `encode` all images of the batch, `start` with empty slots, `prefill` some prompts,
    `decode` a chunk of steps, `grow` the private columns of a layer, `shrink` them to fewer slots (`keep` does so for
    the state), `finish`. The state, the pool and the cache are donated.
    """

    def __init__(
        self,
        functions: ModelFunctions,
        sampling: SamplingConfig,
        placement: Placement,
        banned_ids_mask: Bool[Array | jax.ShapeDtypeStruct, "v"],
        stop_ids: tuple[int, ...],
        reward_tables: ArrayTree,
        output_rows: NamedSharding | None = None,
    ):
        """Banned ids are never drawn and carry no probability. `output_rows`: sharding of the Rollouts, if another."""
        self.sampling = sampling
        self.placement = placement
        self._functions = functions
        self._settings = DecodeSettings(
            sampling.group_size, sampling.max_new_tokens, sampling.decode_chunk, tuple(stop_ids)
        )
        self.constants = replicate((banned_ids_mask, reward_tables), placement.mesh)
        self.encode = jax.jit(self._encode)
        self.start = jax.jit(self._start, static_argnames="layout")
        self.prefill = jax.jit(self._prefill, donate_argnames="pool")
        self.decode = jax.jit(self._decode, donate_argnames=("state", "private"))
        self.grow = jax.jit(cache_lib.grow_ring, static_argnames=("axis", "num_columns"), out_shardings=placement.heads)
        self.shrink = jax.jit(cache_lib.take_sharded, out_shardings=placement.heads)
        self.keep = jax.jit(functools.partial(jnp.take_along_axis, axis=1), out_shardings=placement.rows)
        self.finish = jax.jit(self._finish, out_shardings=output_rows or placement.rows)

    def generate(self, params: Params, prompts: Prompts, key: Key) -> tuple[Rollouts, dict[str, float]]:
        """Samples `group_size` completions of each prompt; row r is sample r % g of prompt r // g.

        Columns after a row's end hold id 0 and are masked out. A row that ends with a stop id keeps it as its last
        token and is not truncated, also when it is the last token that fits.

        Returns:
          The rollouts, and what they took (`sampler/...`).

        Raises:
          ValueError: prompts or slots that do not divide into the shards.
        """
        with jax.set_mesh(self.placement.mesh):
            prompts, key = self.placement.place_inputs(prompts, key)
            return self._generate(params, prompts, key)

    def _generate(self, params: Params, prompts: Prompts, key: Key) -> tuple[Rollouts, dict[str, float]]:
        layout = self.layout(len(prompts.record_ids))
        num_rows = layout.num_prompts * self.sampling.group_size
        features = self.encode(params, prompts)
        state, pool, private, keys = self.start(params, prompts, features, key, self.constants, layout=layout)
        prefixes = Prefixes(layout, self.sampling.group_size)
        num_steps = slot_steps = 0
        while True:
            for index, places in prefixes.due():
                pool = self.prefill(params, prompts, features, index, places, pool)
            queue = Queue(prefixes.ready_rows, prefixes.places.copy())
            num_slots = state.slot_rows.size
            state, private, report = self.decode(params, state, private, pool, queue, keys, self.constants)
            report = jax.device_get(report)
            slot_steps += num_slots * (int(report.num_steps) - num_steps)
            num_steps = int(report.num_steps)
            prefixes.release(report.slot_rows, report.next_row)
            if prefixes.nothing_waits and (report.slot_rows == num_rows).all():
                break
            if prefixes.nothing_waits:
                state, private = self._drop_idle_slots(state, private, report.slot_rows, num_rows)
            private = self._make_room(private, int(report.longest))
        stats = {
            "sampler/decode_steps": float(num_steps),
            "sampler/slot_occupancy": int(report.num_busy) / slot_steps,
            "sampler/prefill_prompts": float(prefixes.num_prefilled),
            "sampler/prefill_tokens": float(jax.device_get(pool.num_tokens)),
        }
        return self.finish(state, self.constants), stats

    def layout(self, num_prompts: int) -> Layout:
        """How a batch of prompts is divided."""
        sampling = self.sampling
        return lay_out(
            num_prompts,
            self.placement.num_shards,
            sampling.group_size,
            num_slots=sampling.num_slots,
            num_prefixes=sampling.num_prefixes,
            prefill_batch=sampling.prefill_batch,
        )

    def _make_room(self, private: PrivateCache, longest: int) -> PrivateCache:
        """Grows the private columns to the next size where the longest rollout in work has outgrown them."""
        old, column = private.num_columns, private.column
        if longest <= old:
            return private
        new = next(size for size in self.sampling.column_ladder if size >= longest)
        private = _map_rings(private, lambda ring, axis: self.grow(ring, column, axis=axis, num_columns=new))
        return dataclasses.replace(private, column=jax.device_put(np.int32(old - 1), self.placement.replicated))

    def _drop_idle_slots(
        self, state: DecodeState, private: PrivateCache, slot_rows: Int[np.ndarray, "z slots"], num_rows: int
    ) -> tuple[DecodeState, PrivateCache]:
        """Keeps half of the slots where that is enough."""
        kept = slots_to_keep(slot_rows, num_rows, self.sampling.min_slots)
        if kept is None:
            return state, private
        slots = {name: self.keep(getattr(state, name), kept) for name in ("slot_rows", "slot_prefixes", "last_ids")}
        return dataclasses.replace(state, **slots), _map_rings(private, lambda ring, _: self.shrink(ring, kept))

    def _encode(self, params, prompts):
        features = self._functions.encode(params, prompts)
        return jax.lax.with_sharding_constraint(features, self.placement.feature_shardings(features))

    def _start(self, params, prompts, features, key, constants, layout):
        sampling, z = self.sampling, layout.num_shards
        _, tables = constants
        prefilled = jax.eval_shape(self._functions.prefill, params, prompts, features)
        pool, private = cache_lib.allocate(
            prefilled, z * layout.num_prefixes, z * layout.num_slots, sampling.column_ladder[0]
        )
        num_rows = layout.num_prompts * sampling.group_size
        state = init_state(z, layout.num_slots, num_rows, self._settings, tables)
        keys = make_row_keys(key, prompts.record_ids, sampling.group_size).reshape(z, num_rows)
        return self.placement.constrain((state, pool, private, keys))

    def _prefill(self, params, prompts, features, index, places, pool):
        chosen = _take_prompts(prompts, index)
        prefilled = self._functions.prefill(params, chosen, features)
        return self.placement.constrain(cache_lib.write_prompts(pool, prefilled, chosen, places))

    def _decode(self, params, state, private, pool, queue, keys, constants):
        banned_ids_mask, tables = constants
        choose = functools.partial(self.choose, banned_ids_mask)
        state, private, report = decode_chunk(
            self._functions, params, state, private, pool, queue, keys, choose, self._settings, tables
        )
        report = jax.lax.with_sharding_constraint(report, self.placement.replicated)
        return *self.placement.constrain((state, private)), report

    def choose(
        self,
        banned_ids_mask: Bool[Array, "v"],
        logits: Float[Array, "n v"],
        row_keys: Key,
        token_index: Int[Array, "n"],
    ) -> tuple[Int[Array, "n"], Float[Array, "n"]]:
        """The next id of every slot and its log-probability, inside `decode`."""
        sampling = self.sampling
        return choose_tokens(
            logits,
            banned_ids_mask,
            lambda: gumbel_noise(row_keys, token_index, logits.shape[-1]),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
        )

    def _finish(self, state, constants):
        _, tables = constants
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), _rollout_fields(state))
        ids, logps, lens, stopped, spans = flat
        mask = jnp.arange(ids.shape[1]) < lens[:, None]
        return Rollouts(ids, mask, logps, lens, ~stopped, reward_spans.finish(tables, spans))


def _rollout_fields(state: DecodeState) -> tuple:
    return state.completion_ids, state.completion_logps, state.completion_len, state.stopped, state.reward_state


def _take_prompts(prompts: Prompts, index: Int[Array, "z q"]) -> Prompts:
    """The prompts `index` of each shard, with the images of the whole batch."""

    def take(path, leaf):
        if path[0].name == "images":
            return leaf
        axis = batch_axis(path)
        return jnp.moveaxis(cache_lib.take_sharded(jnp.moveaxis(leaf, axis, 0), index), 0, axis)

    return jax.tree_util.tree_map_with_path(take, prompts)


def _map_rings(private: PrivateCache, change: Callable[[Array, int], Array]) -> PrivateCache:
    """Changes the buffers, each given with the axis of its columns, one by one, and gives each old one back at once."""

    def replace(rings, axis):
        for ring in rings:
            yield change(ring, axis)
            ring.delete()

    return dataclasses.replace(
        private,
        keys=tuple(replace(private.keys, cache_lib.KEY_COLUMNS)),
        values=tuple(replace(private.values, cache_lib.VALUE_COLUMNS)),
    )


def make_row_keys(key: Key, record_ids: Int[Array, "b"], group_size: int) -> Key:
    """One key per rollout, from the key, the record and the sample number; the token number is folded in per step."""

    def one_record(record_id):
        record_key = jax.random.fold_in(key, record_id)
        return jax.vmap(lambda sample: jax.random.fold_in(record_key, sample))(jnp.arange(group_size))

    keys = jax.vmap(one_record)(record_ids)
    return keys.reshape(-1, *keys.shape[2:])
