"""Every program of a GRPO step as it will be called: the jitted function, its arguments as shapes with shardings, how
often a step calls it, and what else lies on the devices meanwhile.

The programs are those of `programs.build_programs`, on a mesh whose devices need not exist. Batches have the largest
shapes that the config allows: the longest prompt and completion, one image of the largest size for each prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from safegrpo_jax import config as config_lib
from safegrpo_jax.config import Config
from safegrpo_jax.data.packing import pack_images, smallest_bucket
from safegrpo_jax.grpo.packing import pack_rollouts
from safegrpo_jax.models import hf_config
from safegrpo_jax.models.qwen_vl import PUBLISHED_SIZES, QwenVLConfig
from safegrpo_jax.programs import Programs, build_programs
from safegrpo_jax.rewards.automaton import build_tables
from safegrpo_jax.sampling.cache import KEY_COLUMNS, VALUE_COLUMNS, PrivateCache
from safegrpo_jax.sampling.decode import Queue
from safegrpo_jax.sampling.rollout import Sampler
from safegrpo_jax.sharding import batch_shardings, replicate, with_shardings
from safegrpo_jax.types import ArrayTree, Demonstrations, Labels, PackedImages, Packing, Prompts, Rollouts

TYPICAL_SHARE = 4  # completions are taken to be a quarter of max_new_tokens long on average
STOP_ID = 151645  # <|im_end|>; any id compiles to the same program


@dataclasses.dataclass(frozen=True)
class Entry:
    """One program. `arguments` are shapes with shardings, `static` its static arguments; it is traced and called under
    `mesh`. A step makes `calls` calls of it, of `turns` turns of the loop whose turns data decides, where it has one.
    `resident`: bytes on each device, by name, of what is kept meanwhile and is no argument.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[ArrayTree, ...]
    static: dict[str, Any]
    mesh: Mesh
    calls: float
    turns: int
    resident: dict[str, int]

    def trace(self) -> jax.stages.Traced:
        """The program traced on the shapes of its arguments."""
        with jax.set_mesh(self.mesh):
            return self.function.trace(*self.arguments, **self.static)


def planned_model(config: Config) -> QwenVLConfig:
    """The model that a config names, by its size or its folder.

    Raises:
      ValueError: it names none.
    """
    if config.model.path:
        model = hf_config.read_config(config.model.path)
        config_lib.check_size(model, config.model)
    elif config.model.size:
        model = PUBLISHED_SIZES[config.model.size]
    else:
        raise ValueError("--mode=plan needs config.model.size, a published size, or config.model.path, a model folder")
    return config_lib.executed(model, config.model)


def abstract_programs(config: Config, model: QwenVLConfig, mesh: Mesh) -> Programs:
    """The programs of a run on a mesh of devices that need not exist."""
    # A tokenizer of single bytes gives as many machine states as any; its classes are fewer, of tables under 1 MB.
    pieces = [bytes([i]) for i in range(256)]

    def tables(rule_set: str):
        made = build_tables(config.rewards.rules(rule_set), pieces)
        made = dataclasses.replace(made, token_class=np.resize(made.token_class, model.text.vocab_size))
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), made)

    return build_programs(
        config,
        model,
        mesh,
        jax.ShapeDtypeStruct((model.text.vocab_size,), bool),
        (STOP_ID % model.text.vocab_size,),
        tables(config.rewards.rule_set),
        tables(config.rewards.other_rule_set),
    )


def list_entries(config: Config, model: QwenVLConfig, programs: Programs) -> list[Entry]:
    """The programs of one GRPO step in the order of their calls."""
    mesh = programs.mesh
    with jax.set_mesh(mesh):
        params = with_shardings(programs.abstract_params, programs.param_shardings)
        state = with_shardings(jax.eval_shape(programs.init_state["grpo"], params), programs.state_shardings["grpo"])
        reference = jax.eval_shape(programs.freeze, params)
        copy = jax.eval_shape(programs.sampler_params, params)
        prompts = _prompts(config, model, config.train.prompts_per_step, mesh)
        replay = _replay(config, model, mesh)
    held = {"policy": params, "optimizer state": state.opt_state, "reference": reference, "prompts": prompts}
    others = ("optimizer state", "reference", "prompts")
    copying = Entry("copy", programs.sampler_params, (params,), {}, mesh, 1.0, 1, _bytes(held, *others))
    sampler = programs.sampler
    with jax.set_mesh(sampler.placement.mesh):
        sampling, rollouts = _sampling_entries(config, sampler, copy, prompts, held)
    rollouts = _spread(rollouts, mesh)
    packing = _packing(config, prompts, mesh)
    scoring = (params, reference, prompts, rollouts, packing, state.kl_coefficient)
    score = Entry("score", programs.score, scoring, {}, mesh, 1.0, 1, _bytes(held, "optimizer state"))
    experience = _spread(score.trace().out_info[0], mesh)
    held |= {"rollouts": (rollouts.behavior_logps, rollouts.spans)}  # the other fields are also the experience's
    updating = (state, experience, replay, packing)
    update = Entry("update", programs.update, updating, {}, mesh, 1.0, 1, _bytes(held, "reference", "rollouts"))
    return [copying, *sampling, score, update]


def _packing(config: Config, prompts: Prompts, mesh: Mesh) -> Packing | None:
    """The shapes of packed rows where every prompt and every completion has its greatest length."""
    if not config.packing.row_len:
        return None
    (num_prompts, width), num_image_rows = prompts.prompt_ids.shape, prompts.images.segment_ids.shape[0]
    packing = pack_rollouts(
        np.full(num_prompts, width),
        np.full(num_prompts * config.sampling.group_size, config.sampling.max_new_tokens),
        width,
        [[prompt * num_image_rows // num_prompts] for prompt in range(num_prompts)],
        num_image_rows,
        config.packing,
        config.policy_update.num_minibatches,
        config.mesh.data_parallel,
    )
    return replicate(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), packing), mesh)


def _sampling_entries(
    config: Config, sampler: Sampler, copy: ArrayTree, prompts: Prompts, held: dict[str, ArrayTree]
) -> tuple[list[Entry], Rollouts]:
    """The sampler's programs with the largest caches, and the shapes of what they make. `copy`: its parameters."""
    settings, placement, mesh = config.sampling, sampler.placement, sampler.placement.mesh
    num_prompts = config.train.prompts_per_step
    layout, constants = sampler.layout(num_prompts), sampler.constants
    own_prompts = with_shardings(prompts, placement.prompt_shardings(prompts))
    features = jax.eval_shape(sampler.encode, copy, own_prompts)
    features = with_shardings(features, placement.feature_shardings(features))
    starting = (copy, own_prompts, features, replicate(jax.eval_shape(lambda: jax.random.key(0)), mesh), constants)
    started = jax.eval_shape(lambda *arguments: sampler.start(*arguments, layout=layout), *starting)
    state, pool, private, keys = with_shardings(started, placement.shardings(started))
    private = _with_columns(private, settings.column_ladder[-1])
    index = _ints(layout.num_shards, layout.num_prefills)
    shards = layout.num_shards
    queue = jax.eval_shape(
        lambda: Queue(jnp.zeros(shards, jnp.int32), jnp.zeros((shards, layout.num_prompts), jnp.int32))
    )
    held = held | {
        "sampler's prompts": own_prompts,
        "features": features,
        "prefixes": pool,
        "private columns": private,
        "rollouts in work": state,
    }
    trained = ("policy", "optimizer state", "reference", "prompts")
    prefill_calls = float(-(-num_prompts // (layout.num_shards * layout.num_prefills)))
    num_tokens = num_prompts * settings.group_size * settings.max_new_tokens / TYPICAL_SHARE
    decode_steps = num_tokens / (layout.num_shards * layout.num_slots)

    def entry(name, *arguments, calls=1.0, turns=1, beside=(), **static):
        resident = _bytes(held, *trained, *beside)
        return Entry(name, getattr(sampler, name), arguments, static, mesh, calls, turns, resident)

    entries = [
        entry("encode", copy, own_prompts),
        entry("start", *starting, layout=layout),
        entry(
            "prefill", copy, own_prompts, features, index, index, pool,
            calls=prefill_calls, beside=("private columns", "rollouts in work"),
        ),
        entry(
            "decode", copy, state, private, pool, queue, keys, constants,
            calls=decode_steps / settings.decode_chunk,
            turns=settings.decode_chunk,
            beside=("sampler's prompts", "features"),
        ),
        entry(
            "finish", state, constants,
            beside=("sampler's prompts", "features", "prefixes", "private columns"),
        ),
    ]  # fmt: skip
    return entries, jax.eval_shape(sampler.finish, state, constants)


def _bytes(held: dict[str, ArrayTree], *names: str) -> dict[str, int]:
    return {name: bytes_per_device(held[name]) for name in names}


def bytes_per_device(tree: ArrayTree) -> int:
    """Bytes of the largest shards of `tree`, of shapes with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * _itemsize(leaf.dtype) for leaf in jax.tree.leaves(tree)
    )


def _itemsize(dtype) -> int:
    return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize


def _replay(config: Config, model: QwenVLConfig, mesh: Mesh) -> Demonstrations | None:
    rows, length = config.train.replay_batch, config.processor.completion_buckets[-1]
    if not rows:
        return None

    def make():
        tokens = (jnp.zeros((rows, length), dtype) for dtype in (jnp.int32, bool))
        return Demonstrations(_zero_prompts(config, model, rows), *tokens)

    return _spread(jax.eval_shape(make), mesh)


def _prompts(config: Config, model: QwenVLConfig, num_prompts: int, mesh: Mesh) -> Prompts:
    return _spread(jax.eval_shape(lambda: _zero_prompts(config, model, num_prompts)), mesh)


def _zero_prompts(config: Config, model: QwenVLConfig, num_prompts: int) -> Prompts:
    settings = config.processor
    length, num_blocks = settings.prompt_buckets[-1], config_lib.num_blocks(config)
    largest = settings.max_pixels // settings.patch_size**2
    row_size = smallest_bucket(settings.patch_buckets, largest)
    rows = num_blocks * pack_images([[largest]] * num_prompts, num_blocks, row_size)[1]

    def ints(*sizes):
        return jnp.zeros(sizes, jnp.int32)

    labels = [ints(num_prompts) for _ in range(3)]
    return Prompts(
        prompt_ids=ints(num_prompts, length),
        prompt_mask=jnp.zeros((num_prompts, length), bool),
        positions=ints(3, num_prompts, length),
        rope_delta=ints(num_prompts),
        vision_mask=jnp.zeros((num_prompts, length), bool),
        feature_index=ints(num_prompts, length),
        record_ids=ints(num_prompts),
        images=PackedImages(
            patches=jnp.zeros((rows, row_size, model.vision.patch_values)),
            patch_pos=ints(rows, row_size, 2),
            tap_ids=ints(rows, row_size, 4),
            tap_weights=jnp.zeros((rows, row_size, 4)),
            segment_ids=ints(rows, row_size),
        ),
        labels=Labels(
            *labels,
            tagged=jnp.zeros(num_prompts, bool),
            gold_answer=ints(num_prompts) if config.rewards.anchor_answers else None,
        ),
    )


def _spread(tree: ArrayTree, mesh: Mesh) -> ArrayTree:
    """A batch of shapes where `sharding.shard_batch` puts its arrays."""
    return with_shardings(tree, batch_shardings(tree, mesh))


def _with_columns(private: PrivateCache, num_columns: int) -> PrivateCache:
    # Not by the constructor, whose annotations the tests check: these are shapes.
    axes = {"keys": KEY_COLUMNS, "values": VALUE_COLUMNS}

    def widen(path, leaf):
        shape = list(leaf.shape)
        if path[0].name in axes:
            shape[axes[path[0].name]] = num_columns
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype, sharding=leaf.sharding)

    return jax.tree_util.tree_map_with_path(widen, private)


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)
