"""Builds the jitted programs of a run from a Config and a mesh: train, evaluate and plan use these same ones.

Here the rooms meet: model, sampling, rewards and the GRPO maths know nothing of each other. A program
takes and returns sharded arrays; what it takes apart (parameters, reward tables, keys) is an argument, so nothing is
baked into an executable. Donation: updates consume their state.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int

from safegrpo_jax.config import Config
from safegrpo_jax.grpo.advantages import group_advantages, per_rule_advantages, spread_over_spans
from safegrpo_jax.grpo.logps import token_logps
from safegrpo_jax.grpo.loss import kl_estimate
from safegrpo_jax.grpo.optimizer import OptimizerConfig, make_optimizer
from safegrpo_jax.grpo.update import logps_in_blocks, update_policy, update_supervised
from safegrpo_jax.masked import masked_sum
from safegrpo_jax.models import qwen_vl
from safegrpo_jax.models.lora import adapter_mask
from safegrpo_jax.models.qwen_vl import QwenVLConfig
from safegrpo_jax.rewards import spans as reward_spans
from safegrpo_jax.rewards.compose import (
    compute_rewards,
    credited_spans,
    disagreement,
    mean_of_tagged,
    repeat_labels,
    reward_metrics,
    reward_parts,
    shape_by_length,
)
from safegrpo_jax.sampling.decode import ModelFunctions
from safegrpo_jax.sampling.rollout import Placement, Sampler, SamplingConfig
from safegrpo_jax.sft import SupervisedConfig
from safegrpo_jax.sharding import (
    batch_axis,
    batch_sharding,
    compiler_options,
    param_shardings,
    regroup,
    replicate,
)
from safegrpo_jax.types import (
    Array,
    ArrayTree,
    Demonstrations,
    Experience,
    Key,
    Labels,
    Metrics,
    Params,
    Prompts,
    Rewards,
    Rollouts,
    TrainState,
)


@dataclasses.dataclass(frozen=True)
class Programs:
    """The jitted programs of one run. Batches are sharded over the data axes, parameters by their rules.

    `sampler_params(params)` are parameters as sampling wants them: matrices in the compute dtype, laid out for
    decoding. `sampler.generate(sampler_params, prompts, key)` samples groups as GRPO trains on them,
    `greedy_sampler` gives one greedy completion a prompt. `freeze(params)` copies a reference policy, its matrices
    in the compute dtype. `score(params, reference_params, prompts, rollouts)` gives the Experience, the rewards and
    their metrics; `grade(rollouts, labels of the prompts)` the rewards alone. `update(state, experience, replay)`
    is one GRPO step, `supervised[stage](state, demonstrations)` one of "pretrain" or "cold_start".
    `init_state[stage](params)` makes the TrainState of a stage. Both updates and `init_state` consume their first
    argument.
    """

    mesh: Mesh
    abstract_params: Params
    param_shardings: ArrayTree
    init_params: Callable[[Key], Params]
    sampler_params: Callable[[Params], Params]
    freeze: Callable[[Params], Params]
    sampler: Sampler
    greedy_sampler: Sampler
    grade: Callable[[Rollouts, Labels], Rewards]
    score: Callable[[Params, Params, Prompts, Rollouts], tuple[Experience, Rewards, Metrics]]
    update: Callable[[TrainState, Experience, Demonstrations | None], tuple[TrainState, Metrics]]
    supervised: dict[str, Callable[[TrainState, Demonstrations], tuple[TrainState, Metrics]]]
    init_state: dict[str, Callable[[Params], TrainState]]
    state_shardings: dict[str, ArrayTree]


def model_functions(model: QwenVLConfig) -> ModelFunctions:
    """The functions that sampling needs, bound to one model config."""
    return ModelFunctions(
        encode=lambda params, prompts: qwen_vl.encode_images(params, prompts.images, model),
        prefill=lambda params, prompts, features: qwen_vl.prefill(params, prompts, features, model),
        decode=lambda params, token_ids, positions, view, cache: qwen_vl.decode_hidden(
            params, token_ids, positions, view, cache, model
        ),
        logits=lambda params, hidden: qwen_vl.logits_from_hidden(params, hidden, model),
    )


def make_logps_fn(
    model: QwenVLConfig, banned_ids_mask: Bool[Array, "v"], temperature: float, chunk: int, freeze_vision: bool
) -> Callable[[Params, Prompts, Array, Array], tuple[Array, Array]]:
    """`logps_fn(params, prompts, completion_ids [n c], completion_mask [n c]) -> (logps [n c], entropy [n c])`.

    Row r of the completions continues prompt r // (n // b). Images are encoded once per prompt. With
    `freeze_vision` no gradient reaches the vision tower.
    """

    def logps_fn(params, prompts, completion_ids, completion_mask):
        features = qwen_vl.encode_images(params, prompts.images, model)
        if freeze_vision:
            features = jax.lax.stop_gradient(features)
        group = completion_ids.shape[0] // prompts.prompt_ids.shape[0]
        rows = _join(prompts, completion_ids, completion_mask, group)
        hidden = qwen_vl.text_hidden(params, *rows, features, model)
        prompt_len = prompts.prompt_ids.shape[1]
        # The hidden state at token t predicts token t + 1.
        return token_logps(
            lambda h: qwen_vl.logits_from_hidden(params, h, model),
            hidden[:, prompt_len - 1 : -1],
            completion_ids,
            completion_mask,
            banned_ids_mask,
            temperature,
            chunk,
        )

    return logps_fn


def _join(prompts: Prompts, completion_ids: Int[Array, "n c"], completion_mask: Bool[Array, "n c"], group: int):
    """Token rows of prompt + completion: ids, mask, positions [3 n t], vision mask, feature index."""

    def repeat(x, axis=0):
        return jnp.repeat(x, group, axis=axis)

    length = completion_ids.shape[1]
    start = prompts.prompt_mask.sum(-1, dtype=jnp.int32) + prompts.rope_delta
    completion_pos = repeat(start)[:, None] + jnp.arange(length, dtype=jnp.int32)
    no_vision = jnp.zeros_like(completion_ids)
    return (
        jnp.concatenate([repeat(prompts.prompt_ids), completion_ids], 1),
        jnp.concatenate([repeat(prompts.prompt_mask), completion_mask], 1),
        jnp.concatenate(
            [repeat(prompts.positions, 1), jnp.broadcast_to(completion_pos, (3, *completion_pos.shape))], 2
        ),
        jnp.concatenate([repeat(prompts.vision_mask), no_vision.astype(bool)], 1),
        jnp.concatenate([repeat(prompts.feature_index), no_vision], 1),
    )


def rollout_metrics(rollouts: Rollouts) -> Metrics:
    """Lengths, endings and refusals of a batch of completions."""
    lengths = rollouts.completion_len
    return {
        "rollout/tokens": lengths.sum(),
        "rollout/completion_len_mean": lengths.astype(jnp.float32).mean(),
        "rollout/completion_len_max": lengths.max(),
        "rollout/truncated_fraction": rollouts.truncated.astype(jnp.float32).mean(),
        "rollout/refusal_fraction": rollouts.spans.refusal.astype(jnp.float32).mean(),
    }


def trainable_mask(abstract_params: Params, freeze_vision: bool) -> ArrayTree:
    """True for every parameter that a stage trains: the adapters where there are any, else all of them."""
    mask = adapter_mask(abstract_params)
    if not any(jax.tree.leaves(mask)):
        mask = jax.tree.map(lambda _: True, abstract_params)
    if freeze_vision:
        mask["vision"] = jax.tree.map(lambda _: False, mask["vision"])
    return mask


def build_programs(
    config: Config,
    model: QwenVLConfig,
    mesh: Mesh,
    banned_ids_mask: Bool[Array | jax.ShapeDtypeStruct, "v"],
    stop_ids: tuple[int, ...],
    reward_tables: ArrayTree,
    other_reward_tables: ArrayTree,
) -> Programs:
    """Builds (but does not yet compile) every program of the run. Shapes for arrays are enough to compile them.

    `other_reward_tables` are those of the rule set that is not used: the metrics say how often the two disagree.
    """
    abstract = jax.eval_shape(lambda: qwen_vl.init_params(model, jax.random.key(0)))
    shardings = param_shardings(abstract, mesh, config=config.sharding)
    replicated = NamedSharding(mesh, PartitionSpec())
    other_tables, banned = replicate((other_reward_tables, banned_ids_mask), mesh)
    pretrain, cold_start, grpo = (
        _build_stage(optimizer, trainable_mask(abstract, frozen), abstract, shardings, replicated)
        for optimizer, frozen in (
            (config.pretrain.optimizer, False),
            (config.cold_start.optimizer, False),
            (config.optimizer, config.model.freeze_vision),
        )
    )
    greedy = dataclasses.replace(config.sampling, group_size=1, temperature=0.0)

    sampling_mesh = regroup(mesh, config.mesh.sampling_axis_sizes)
    placement = Placement(sampling_mesh, config.mesh.batch_axes, _head_axis(config, model))

    def build_sampler(sampling: SamplingConfig) -> Sampler:
        rows = batch_sharding(mesh)
        return Sampler(model_functions(model), sampling, placement, banned_ids_mask, stop_ids, reward_tables, rows)

    return Programs(
        mesh=mesh,
        abstract_params=abstract,
        param_shardings=shardings,
        init_params=jax.jit(lambda key: qwen_vl.init_params(model, key), out_shardings=shardings),
        sampler_params=_build_sampler_params(model, param_shardings(abstract, sampling_mesh, config=config.sharding)),
        freeze=jax.jit(functools.partial(qwen_vl.cast_weights, config=model), out_shardings=shardings),
        sampler=build_sampler(config.sampling),
        greedy_sampler=build_sampler(greedy),
        grade=_build_grade(config),
        score=Bound(_build_score(config, model, mesh), banned, other_tables),
        update=Bound(_build_update(config, model, grpo, replicated), banned),
        supervised={
            "pretrain": Bound(_build_supervised(config, config.pretrain, model, pretrain, replicated), banned),
            "cold_start": Bound(_build_supervised(config, config.cold_start, model, cold_start, replicated), banned),
        },
        init_state={"pretrain": pretrain.init, "cold_start": cold_start.init, "grpo": grpo.init},
        state_shardings={
            "pretrain": pretrain.shardings,
            "cold_start": cold_start.shardings,
            "grpo": grpo.shardings,
        },
    )


def _build_sampler_params(model: QwenVLConfig, layout: ArrayTree) -> Callable[[Params], Params]:
    """Casts, then lays out. Stacks go layer by layer: where the partitioned axis changes, the compiler brings an array
    whole to every device."""

    def move(path, leaf, target):
        if "layers" not in jax.tree_util.keystr(path) or not any(target.spec):
            return leaf
        layer_target = NamedSharding(target.mesh, PartitionSpec(*target.spec[1:]))
        return jax.lax.map(lambda layer: jax.lax.with_sharding_constraint(layer, layer_target), leaf)

    def sampler_params(params):
        return jax.tree_util.tree_map_with_path(move, qwen_vl.cast_weights(params, model), layout)

    return jax.jit(sampler_params, out_shardings=layout)


class _Stage(NamedTuple):
    """The trainable part of a stage: its optimizer, its state from parameters, and where that state lives."""

    optimizer: optax.GradientTransformation
    trainable: ArrayTree
    init: Callable[[Params], TrainState]
    shardings: ArrayTree


class Bound:
    """A jitted program with its last arguments fixed. They stay arguments of the executable, not constants in it."""

    def __init__(self, program: Callable, *last: ArrayTree):
        self._program, self._last = program, last

    def __call__(self, *arguments: Any) -> Any:
        return self._program(*arguments, *self._last)

    def trace(self, *arguments: Any) -> jax.stages.Traced:
        return self._program.trace(*arguments, *self._last)


def _build_stage(
    optimizer_config: OptimizerConfig,
    trainable: ArrayTree,
    abstract_params: Params,
    params_sharding: ArrayTree,
    replicated: NamedSharding,
) -> _Stage:
    optimizer = make_optimizer(optimizer_config, trainable)

    def init(params):
        return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))

    shardings = _state_shardings(jax.eval_shape(init, abstract_params), params_sharding, replicated)
    return _Stage(optimizer, trainable, jax.jit(init, out_shardings=shardings, donate_argnums=0), shardings)


def _build_supervised(
    config: Config, settings: SupervisedConfig, model: QwenVLConfig, stage: _Stage, replicated: NamedSharding
) -> Callable:
    def step(state, demonstrations, banned):
        return update_supervised(
            state,
            demonstrations,
            logps_fn=make_logps_fn(model, banned, 1.0, config.model.logits_chunk, freeze_vision=False),
            optimizer=stage.optimizer,
            num_microbatches=settings.num_microbatches,
            trainable_mask=stage.trainable,
            batch_axes=config.mesh.batch_axes,
        )

    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(stage.shardings, replicated),
        compiler_options=compiler_options(replicated.mesh),
    )


def _build_update(config: Config, model: QwenVLConfig, stage: _Stage, replicated: NamedSharding) -> Callable:
    def update(state, experience, replay, banned):
        settings = config.model
        return update_policy(
            state,
            experience,
            replay,
            logps_fn=make_logps_fn(
                model, banned, config.sampling.temperature, settings.logits_chunk, settings.freeze_vision
            ),
            optimizer=stage.optimizer,
            loss=config.loss,
            update=dataclasses.replace(config.policy_update, batch_axes=config.mesh.batch_axes),
            trainable_mask=stage.trainable,
        )

    return jax.jit(
        update,
        donate_argnums=0,
        out_shardings=(stage.shardings, replicated),
        compiler_options=compiler_options(replicated.mesh),
    )


def _build_score(config: Config, model: QwenVLConfig, mesh: Mesh) -> Callable:
    loss, sampling = config.loss, config.sampling
    logps_of = functools.partial(
        make_logps_fn, model, temperature=sampling.temperature, chunk=config.model.logits_chunk
    )

    def score(params, reference_params, prompts, rollouts, banned, other_tables):
        mask = rollouts.completion_mask
        all_at_once = logps_of(banned_ids_mask=banned, freeze_vision=True)
        num_blocks = config.policy_update.num_minibatches * config.policy_update.num_microbatches

        def logps_fn(params, *batch):
            return logps_in_blocks(params, *batch, all_at_once, num_blocks, config.mesh.batch_axes)

        tokens = (prompts, rollouts.completion_ids, mask)
        labels = repeat_labels(prompts.labels, sampling.group_size)
        plain = compute_rewards(rollouts.spans, labels, config.rewards)
        rewards = shape_by_length(plain, labels, rollouts.completion_len, sampling.max_new_tokens, config.rewards)
        # What the loss does not read is not computed at all.
        reference_logps = proximal_logps = rollouts.behavior_logps
        if loss.kl_estimator != "none":
            reference_logps = logps_fn(reference_params, *tokens)
        if loss.ratio_anchor == "proximal":
            proximal_logps = logps_fn(params, *tokens)
        returns = rewards
        if loss.kl_in_reward:
            divergence = kl_estimate(rollouts.behavior_logps, reference_logps, loss.kl_estimator)
            price = loss.kl_coefficient * masked_sum(divergence, mask, axis=1)
            returns = dataclasses.replace(rewards, total=rewards.total - price)
        advantages, stats = _advantages(returns, rollouts, labels, config)
        if loss.mask_truncated:
            mask = mask & ~rollouts.truncated[:, None]
        experience = Experience(
            prompts=prompts,
            completion_ids=rollouts.completion_ids,
            completion_mask=mask,
            behavior_logps=rollouts.behavior_logps,
            proximal_logps=proximal_logps,
            reference_logps=reference_logps,
            advantages=advantages * mask,
        )
        # Where the update expects it; with the compiler's choice the update could be compiled for another layout.
        layout = jax.tree_util.tree_map_with_path(lambda path, _: batch_sharding(mesh, batch_axis(path)), experience)
        experience = jax.lax.with_sharding_constraint(experience, layout)
        stats |= reward_metrics(rewards, labels) | rollout_metrics(rollouts)
        return experience, rewards, stats | _rule_set_metrics(plain, rollouts, labels, other_tables, config)

    return jax.jit(score, compiler_options=compiler_options(mesh))


def _advantages(
    rewards: Rewards, rollouts: Rollouts, labels: Labels, config: Config
) -> tuple[Float[Array, "n c"], Metrics]:
    """Advantages of all tokens as the config asks for, and their statistics (spreads are those of the total)."""
    settings, group = config.advantages, config.sampling.group_size
    advantages, stats = group_advantages(rewards.total, group, settings)
    if settings.normalize == "per_rule":
        weights, values = zip(*reward_parts(rewards.rules, config.rewards).values(), strict=True)
        advantages = per_rule_advantages(values, weights, group, settings)
        stats |= {"advantage/abs_max": jnp.max(jnp.abs(advantages)), "advantage/std": jnp.std(advantages)}
    if settings.credit == "completion":
        return advantages[:, None], stats
    spans = credited_spans(rewards, rollouts.spans, labels, config.rewards)
    num_tokens = rollouts.completion_ids.shape[1]
    return spread_over_spans(advantages, *spans, num_tokens, group, settings), stats


def _rule_set_metrics(
    rewards: Rewards, rollouts: Rollouts, labels: Labels, other_tables: ArrayTree, config: Config
) -> Metrics:
    """How often the other rule set would have rewarded otherwise, and its mean reward."""
    other_config = dataclasses.replace(config.rewards, rule_set=config.rewards.other_rule_set)
    found = reward_spans.scan(other_tables, rollouts.completion_ids, rollouts.completion_mask)
    other = compute_rewards(found, labels, other_config)
    return {
        "reward/rule_set_disagreement": disagreement(rewards, other, labels),
        f"reward/total_mean_under_{config.rewards.other_rule_set}": mean_of_tagged(other.total, labels),
    }


def _build_grade(config: Config) -> Callable:
    def grade(rollouts, labels):
        group = rollouts.completion_len.shape[0] // labels.combined.shape[0]
        return compute_rewards(rollouts.spans, repeat_labels(labels, group), config.rewards)

    return jax.jit(grade)


def _head_axis(config: Config, model: QwenVLConfig) -> str | None:
    """The mesh axis that the cache's key heads are spread over, as the projections that make them are."""
    axis = config.sharding.kv_heads
    parts = config.mesh.sampling_axis_sizes[axis] if axis else 1
    return axis if parts > 1 and model.text.num_kv_heads % parts == 0 else None


def _state_shardings(state: TrainState, params_sharding: ArrayTree, replicated: NamedSharding) -> ArrayTree:
    """Moments are sharded like their parameters, counters are replicated.

    A moment is recognised by its path, which ends in the path of its parameter.
    """
    by_path = {_names(path): sharding for path, sharding in jax.tree_util.tree_flatten_with_path(params_sharding)[0]}
    longest = max(map(len, by_path))

    def choose(path, leaf):
        names = _names(path)
        for length in range(min(len(names), longest), 0, -1):
            if names[-length:] in by_path:
                return by_path[names[-length:]]
        return replicated

    return jax.tree_util.tree_map_with_path(choose, state)


def _names(path) -> tuple[str, ...]:
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
