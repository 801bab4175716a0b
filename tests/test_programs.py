"""The scoring program of a run: what the loss asks for is computed, and nothing else."""

import dataclasses

import jax
import numpy as np
import pytest
from test_train import toy_config

from safegrpo_jax import config as config_lib
from safegrpo_jax import run as run_lib
from safegrpo_jax.grpo.advantages import AdvantageConfig, group_advantages
from safegrpo_jax.grpo.loss import LossConfig, kl_estimate
from safegrpo_jax.grpo.optimizer import OptimizerConfig

SAME_PASS = 1e-5  # the same log-probabilities by two compiled programs, in float32


@pytest.fixture(scope="module")
def rollout_batch(tmp_path_factory):
    """(run, parameters, other parameters, prompts, rollouts of the parameters; some cut off, rewards all alike)."""
    folder = tmp_path_factory.mktemp("programs")
    config = toy_config(folder / "cache")
    run = run_lib.build_run(config, folder / "run", ("train",))
    with jax.set_mesh(run.mesh):
        params = run.initial_params()
        other = jax.tree.map(lambda leaf: leaf * 1.05, params)
        prompts = run.prompts(run.records["train"][:16], config_lib.num_blocks(config))
        rollouts, _ = run.programs.sampler.generate(params, prompts, jax.random.key(3))
    # An untrained model never stops: end the first half of the rows one token early, as if they had.
    lengths = np.asarray(rollouts.completion_len) - (np.arange(32) < 16)
    mask = np.arange(12) < lengths[:, None]
    rollouts = dataclasses.replace(
        rollouts,
        completion_mask=mask,
        behavior_logps=np.where(mask, rollouts.behavior_logps, 0).astype(np.float32),
        completion_len=lengths.astype(np.int32),
        truncated=np.arange(32) >= 16,
    )
    return run, params, other, prompts, rollouts


def score(batch, **loss_settings):
    run, params, other, prompts, rollouts = batch
    config = dataclasses.replace(run.config, loss=LossConfig(**loss_settings), advantages=AdvantageConfig(scale="none"))
    programs = run_lib.build_run(config, run.workdir, ()).programs
    coefficient = np.float32(config.loss.kl_coefficient)
    with jax.set_mesh(run.mesh):
        experience, rewards, _ = jax.device_get(programs.score(params, other, prompts, rollouts, None, coefficient))
    return experience, rewards


def test_kl_in_the_reward_sets_the_advantages(rollout_batch):
    rollouts = rollout_batch[-1]
    experience, rewards = score(rollout_batch, kl_coefficient=0.2, kl_in_reward=True)
    assert np.ptp(rewards.total) == 0, "rewards alone would give no advantage"
    divergence = np.asarray(kl_estimate(rollouts.behavior_logps, experience.reference_logps, "k3"))
    returns = rewards.total - 0.2 * np.where(rollouts.completion_mask, divergence, 0).sum(1)
    expected, _ = group_advantages(returns.astype(np.float32), 2, AdvantageConfig(scale="none"))
    assert np.abs(expected).max() > 1e-4
    np.testing.assert_allclose(experience.advantages[:, 0], expected, rtol=1e-4, atol=1e-7)


def test_truncated_completions_can_be_left_out(rollout_batch):
    rollouts = rollout_batch[-1]
    plain, _ = score(rollout_batch)
    masked, _ = score(rollout_batch, mask_truncated=True)
    np.testing.assert_array_equal(plain.completion_mask, rollouts.completion_mask)
    assert not masked.completion_mask[16:].any()
    np.testing.assert_array_equal(masked.completion_mask[:16], rollouts.completion_mask[:16])


def test_proximal_logps_are_those_of_the_policy_in_training(rollout_batch):
    rollouts = rollout_batch[-1]
    mask = np.asarray(rollouts.completion_mask)
    experience, _ = score(rollout_batch, ratio_anchor="proximal")
    np.testing.assert_allclose(experience.proximal_logps[mask], rollouts.behavior_logps[mask], atol=SAME_PASS)
    assert np.abs(experience.reference_logps - experience.proximal_logps)[mask].max() > 100 * SAME_PASS
    run, params = rollout_batch[:2]
    no_reference = dataclasses.replace(run.config, loss=LossConfig(kl_estimator="none", kl_coefficient=0.0))
    assert not jax.tree.leaves(run_lib.build_run(no_reference, run.workdir, ()).programs.freeze(params))
    unread, _ = score(rollout_batch, kl_estimator="none", kl_coefficient=0.0)
    np.testing.assert_array_equal(unread.proximal_logps, rollouts.behavior_logps)
    np.testing.assert_array_equal(unread.reference_logps, rollouts.behavior_logps)


def test_moments_of_another_shape_are_replicated(rollout_batch):
    """Adafactor's: of these small matrices it keeps one number in place of the factors."""
    run, params, *_ = rollout_batch
    config = dataclasses.replace(run.config, optimizer=OptimizerConfig(method="adafactor"))
    programs = run_lib.build_run(config, run.workdir, ()).programs
    with jax.set_mesh(run.mesh):
        state = programs.init_state["grpo"](jax.tree.map(jax.numpy.copy, params))
    leaves = zip(jax.tree.leaves(state), jax.tree.leaves(programs.state_shardings["grpo"]), strict=True)
    assert all(leaf.sharding.is_equivalent_to(sharding, leaf.ndim) for leaf, sharding in leaves)


def test_sampling_has_a_layout_of_its_own(rollout_batch, tmp_path):
    """A mesh that spreads parameters over the batch's devices for training, and only heads and mlp for sampling."""
    run, params, _, _, rollouts = rollout_batch
    mesh = dataclasses.replace(run.config.mesh, data=2, fsdp=4, sampling_tensor=2)
    config = dataclasses.replace(run.config, mesh=mesh)
    other = run_lib.build_run(config, tmp_path / "run", ("train",))
    with jax.set_mesh(other.mesh):
        prompts = other.prompts(other.records["train"][:16], config_lib.num_blocks(config))
        trained = jax.device_put(jax.device_get(params), other.programs.param_shardings)
        sampled = other.programs.sampler_params(trained)
        again, _ = other.programs.sampler.generate(sampled, prompts, jax.random.key(3))
    np.testing.assert_array_equal(np.asarray(again.completion_ids), np.asarray(rollouts.completion_ids))
    assert again.completion_ids.sharding.shard_shape((32, 12)) == (4, 12)
    shapes = {
        name: tree["text"]["layers"]["mlp"]["gate"]["kernel"].sharding.shard_shape((1, 32, 32))
        for name, tree in (("trained", trained), ("sampled", sampled))
    }
    assert shapes == {"trained": (1, 8, 32), "sampled": (1, 32, 16)}
