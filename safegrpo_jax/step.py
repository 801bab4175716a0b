"""One GRPO step on the host: sample groups, sample some again, pack, score, update, and tell what it took.

The key of a step is all of its randomness: attempt a of sampling again uses fold_in(key, a), so a resumed run draws
the same. Nothing here loops over steps or saves anything but rollout files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging

from safegrpo_jax import config as config_lib
from safegrpo_jax import processes
from safegrpo_jax.config import Config
from safegrpo_jax.data.records import Record
from safegrpo_jax.evaluation.rows import rollout_rows
from safegrpo_jax.metrics import StageTimer, save_image, write_rollouts
from safegrpo_jax.run import Run
from safegrpo_jax.types import ArrayTree, Params, Prompts, Rewards, Rollouts, TrainState


def grpo_step(
    run: Run,
    state: TrainState,
    reference: ArrayTree,
    records: Sequence[Record],
    replay_records: Sequence[Record] | None,
    key: jax.Array,
    step: int,
) -> tuple[TrainState, dict[str, float]]:
    """One step: sample groups, score them, update. Returns the new state and the step's metrics.

    `reference` is the fixed policy of the KL term, as `programs.freeze` gives it.
    """
    timer = StageTimer()
    num_blocks = config_lib.num_blocks(run.config)
    with timer("encode"):
        prompts = run.prompts(records, num_blocks)
        replay = run.demonstrations(replay_records, num_blocks) if replay_records else None
    with timer("generate"):
        sampler_params = run.programs.sampler_params(state.params)
        rollouts, sampler_stats = sample_groups(run, sampler_params, records, prompts, key)
        del sampler_params  # room for the passes that follow
    with timer("score"):
        packing, token_stats = run.pack(prompts, rollouts)
        experience, rewards, stats = jax.block_until_ready(
            run.programs.score(state.params, reference, prompts, rollouts, packing, state.kl_coefficient)
        )
    advantages = experience.advantages
    if step % run.config.train.dump_rollouts_every == 0 or step == run.config.train.num_steps:
        _dump(run, records, *processes.fetch((rollouts, rewards, advantages)), step)
    with timer("update"):
        state, update_stats = jax.block_until_ready(run.programs.update(state, experience, replay, packing))
    metrics = {name: float(value) for name, value in (jax.device_get(stats) | jax.device_get(update_stats)).items()}
    metrics |= token_stats | sampler_stats | timer.pop()
    return state, metrics | throughput(metrics, run.config, text_matmul_size(run))


def sample_groups(
    run: Run, sampler_params: Params, records: Sequence[Record], prompts: Prompts, key: jax.Array
) -> tuple[Rollouts, dict[str, float]]:
    """Groups of samples; those whose rewards are all equal are sampled again, `train.max_resamples` times at most.

    A group that stays so is kept: its advantages are 0. The statistics are the sampler's for the first draw, and the
    number of groups that were drawn again. Source: dynamic sampling (DAPO, arXiv 2503.14476), here with a bound.
    """
    rollouts, stats = run.programs.sampler.generate(sampler_params, prompts, key)
    group, num_again = run.config.sampling.group_size, 0
    for attempt in range(1, run.config.train.max_resamples + 1):
        rewards = processes.fetch(run.programs.grade(rollouts, prompts.labels).total).reshape(-1, group)
        constant = np.flatnonzero(rewards.max(1) == rewards.min(1))
        if not len(constant):
            break
        size = _smallest_half(len(records), len(constant), run.config.mesh.data_parallel)
        chosen = np.resize(constant, size)  # what repeats is drawn from the same noise, hence the same
        part = run.prompts([records[index] for index in chosen], run.config.mesh.data_parallel)
        fresh, _ = run.programs.sampler.generate(sampler_params, part, jax.random.fold_in(key, attempt))
        rows = (chosen[:, None] * group + np.arange(group)).reshape(-1)
        rollouts = _replace_rows(rollouts, fresh, rows)
        num_again += len(constant)
    return rollouts, stats | {"rollout/resampled_groups": float(num_again)}


def _smallest_half(size: int, needed: int, divisor: int) -> int:
    """The smallest of size, size / 2, size / 4 ... that holds `needed` and that `divisor` divides: few shapes."""
    while size % 2 == 0 and size // 2 >= needed and (size // 2) % divisor == 0:
        size //= 2
    return size


@jax.jit
def _replace_rows(rollouts, fresh, rows):
    return jax.tree.map(lambda old, new: old.at[rows].set(new), rollouts, fresh)


def text_matmul_size(run: Run) -> float:
    """Parameters of the text decoder that multiply a token: no embedding look-up, of experts only the chosen share."""
    text = run.model.text
    share = text.experts_per_token / text.num_experts if text.num_experts else 1.0

    def size(path, leaf):
        names = [key.key for key in path]
        if names == ["embed"] and not text.tied_embeddings:
            return 0.0
        return math.prod(leaf.shape) * (share if "mlp" in names and "router" not in names else 1.0)

    return sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(size, run.programs.abstract_params["text"])))


def throughput(metrics: dict[str, float], config: Config, matmul_size: float) -> dict[str, float]:
    """Tokens trained on per second of the whole step, and how much of the devices' peak score and update use.

    The estimate counts 2 FLOPs per parameter and real token for every pass forward, and 4 for the way back (2 where the
    weights are frozen under adapters); attention scores, the vision tower, rematerialisation and padding count nothing,
    so the devices do more than it says.
    """
    tokens = metrics["update/real_tokens"]
    seconds = sum(value for name, value in metrics.items() if name.startswith("time/"))
    result = {"time/tokens_per_second": tokens / seconds}
    if config.mesh.peak_flops:
        passes = (config.loss.kl_estimator != "none") + (config.loss.ratio_anchor == "proximal")
        update = (4 if config.model.lora.rank else 6) * config.policy_update.num_epochs
        devices = math.prod(config.mesh.axis_sizes.values())
        busy = metrics["time/score_seconds"] + metrics["time/update_seconds"]
        flops = tokens * matmul_size * (2 * passes + update)
        result["time/mfu_estimate"] = flops / (busy * config.mesh.peak_flops * devices)
    return result


def drop_broken(metrics: dict[str, float], stage: str, step: int, limit: int) -> dict[str, float]:
    """Without the numbers that a skipped optimizer step broke, while fewer than `limit` in a row were skipped.

    Left in, they are refused by the writer, which stops the run and names them.
    """
    if not metrics["update/skipped_steps"] or metrics["update/skipped_in_row"] >= limit:
        return metrics
    kept = {name: value for name, value in metrics.items() if math.isfinite(value)}
    broken = ", ".join(sorted(metrics.keys() - kept.keys()))
    logging.warning("%s step %d: a step with a broken gradient was skipped; not finite: %s", stage, step, broken)
    return kept


def _dump(run: Run, records, rollouts: Rollouts, rewards: Rewards, advantages: np.ndarray, step: int) -> None:
    if not processes.is_first():
        return
    images = [save_image(run.workdir, record.images[0]) if record.images else "" for record in records]
    # The first token of a completion lies in no tag: its advantage is that of the completion, also with span credit.
    rows = rollout_rows(records, images, rollouts, rewards, run.processor, run.token_bytes, step, advantages[:, 0])
    write_rollouts(run.workdir, step, rows)
