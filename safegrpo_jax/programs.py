"""Builds the jitted programs of a run from a Config and a mesh: train, evaluate and plan use these same ones.

Here the rooms meet: model, sampling, rewards and the GRPO maths know nothing of each other. A program
takes and returns sharded arrays; what it takes apart (parameters, reward tables, keys) is an argument, so nothing is
baked into an executable. Donation: updates consume their state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float

from safegrpo_jax.config import Config
from safegrpo_jax.grpo.advantages import group_advantages, per_rule_advantages, spread_over_spans
from safegrpo_jax.grpo.loss import kl_estimate
from safegrpo_jax.grpo.optimizer import OptimizerConfig, make_optimizer, merge_trainable, select_trainable
from safegrpo_jax.grpo.update import logps_in_blocks, packed_logps, update_policy, update_supervised
from safegrpo_jax.masked import masked_sum
from safegrpo_jax.models import qwen_vl
from safegrpo_jax.models.lora import trainable_mask
from safegrpo_jax.models.qwen_vl import QwenVLConfig
from safegrpo_jax.policy import make_logps_fn, model_functions
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
from safegrpo_jax.sampling.rollout import Placement, Sampler, SamplingConfig
from safegrpo_jax.sft import SupervisedConfig
from safegrpo_jax.sharding import (
    batch_sharding,
    batch_shardings,
    compiler_options,
    param_shardings,
    regroup,
    replicate,
    state_shardings,
)
from safegrpo_jax.types import (
    Array,
    ArrayTree,
    Demonstrations,
    Experience,
    Key,
    Labels,
    Metrics,
    Packing,
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
    `greedy_sampler` gives one greedy completion a prompt. `freeze(params)` is the reference policy: copies of the
    leaves that GRPO trains, matrices in the compute dtype, None for those that it shares with the policy.
    `score(params, reference, prompts, rollouts, packing, kl_coefficient)` gives the Experience, the rewards and their
    metrics; `grade(rollouts, labels of the prompts)` the rewards alone. `update(state, experience, replay, packing)`
    is one GRPO step, `supervised[stage](state, demonstrations)` one of "pretrain" or "cold_start". `packing` is None
    for padded rows. `init_state[stage](params)` makes the TrainState of a stage. Both updates and `init_state` consume
    their first argument.
    """

    mesh: Mesh
    abstract_params: Params
    param_shardings: ArrayTree
    init_params: Callable[[Key], Params]
    sampler_params: Callable[[Params], Params]
    freeze: Callable[[Params], ArrayTree]
    sampler: Sampler
    greedy_sampler: Sampler
    grade: Callable[[Rollouts, Labels], Rewards]
    score: Callable[[Params, ArrayTree, Prompts, Rollouts, Packing | None, Array], tuple[Experience, Rewards, Metrics]]
    update: Callable[[TrainState, Experience, Demonstrations | None, Packing | None], tuple[TrainState, Metrics]]
    supervised: dict[str, Callable[[TrainState, Demonstrations], tuple[TrainState, Metrics]]]
    init_state: dict[str, Callable[[Params], TrainState]]
    state_shardings: dict[str, ArrayTree]


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
        _build_stage(
            optimizer, trainable_mask(abstract, frozen), config.loss.kl_coefficient, abstract, shardings, replicated
        )
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
        freeze=_build_freeze(config, model, shardings),
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


def _build_freeze(config: Config, model: QwenVLConfig, shardings: ArrayTree) -> Callable[[Params], ArrayTree]:
    mask = trainable_mask(shardings, config.model.freeze_vision)
    if config.loss.kl_estimator == "none":  # nothing will read it
        mask = jax.tree.map(lambda _: False, mask)
    return jax.jit(
        lambda params: select_trainable(qwen_vl.cast_weights(params, model), mask),
        out_shardings=select_trainable(shardings, mask),
    )


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
    kl_coefficient: float,
    abstract_params: Params,
    params_sharding: ArrayTree,
    replicated: NamedSharding,
) -> _Stage:
    optimizer = make_optimizer(optimizer_config, trainable)

    def init(params):
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            skipped_in_row=jnp.zeros((), jnp.int32),
            kl_coefficient=jnp.asarray(kl_coefficient, jnp.float32),
        )

    shardings = state_shardings(jax.eval_shape(init, abstract_params), params_sharding, replicated)
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
    def update(state, experience, replay, packing, banned):
        return update_policy(
            state,
            experience,
            replay,
            packing,
            logps_fn=_policy_logps(config, model, banned, config.model.freeze_vision),
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


def _policy_logps(config: Config, model: QwenVLConfig, banned: Bool[Array, "v"], freeze_vision: bool) -> Callable:
    """The log-probabilities of sampling, as update and score need them."""
    return make_logps_fn(
        model,
        banned,
        config.sampling.temperature,
        config.model.logits_chunk,
        freeze_vision,
        config.packing.share_prompts,
        config.mesh.batch_axes,
    )


def _build_score(config: Config, model: QwenVLConfig, mesh: Mesh) -> Callable:
    loss, sampling = config.loss, config.sampling

    def score(params, reference, prompts, rollouts, packing, kl_coefficient, banned, other_tables):
        mask = rollouts.completion_mask
        tokens = (prompts, rollouts.completion_ids, mask)
        logps_fn = _policy_logps(config, model, banned, freeze_vision=True)

        def logps_under(params):
            count, axes = config.policy_update.num_minibatches, config.mesh.batch_axes
            if packing is None:
                return logps_in_blocks(params, *tokens, logps_fn, count * config.policy_update.num_microbatches, axes)
            return packed_logps(params, *tokens, packing, logps_fn=logps_fn, num_minibatches=count, batch_axes=axes)

        labels = repeat_labels(prompts.labels, sampling.group_size)
        plain = compute_rewards(rollouts.spans, labels, config.rewards)
        rewards = shape_by_length(plain, labels, rollouts.completion_len, sampling.max_new_tokens, config.rewards)
        # What the loss does not read is not computed at all.
        reference_logps = proximal_logps = rollouts.behavior_logps
        if loss.kl_estimator != "none":
            reference_logps = logps_under(merge_trainable(reference, params))
        if loss.ratio_anchor == "proximal":
            proximal_logps = logps_under(params)
        returns = rewards
        if loss.kl_in_reward:
            divergence = kl_estimate(rollouts.behavior_logps, reference_logps, loss.kl_estimator)
            price = kl_coefficient * masked_sum(divergence, mask, axis=1)
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
        experience = jax.lax.with_sharding_constraint(experience, batch_shardings(experience, mesh))
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
