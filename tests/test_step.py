"""One GRPO step on the host: sampling again, broken steps, throughput; and runs with these options, resumed."""

import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import metrics_of, toy_config

from safegrpo_jax import config as config_lib
from safegrpo_jax import run as run_lib
from safegrpo_jax import train
from safegrpo_jax.config import Config, MeshConfig
from safegrpo_jax.grpo.loss import LossConfig
from safegrpo_jax.grpo.packing import PackingConfig
from safegrpo_jax.metrics import NonFiniteError
from safegrpo_jax.sft import SupervisedConfig
from safegrpo_jax.step import drop_broken, sample_groups, text_matmul_size, throughput
from safegrpo_jax.types import Rewards

GROUP = 2  # of the toy config


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def grpo_only(cache_folder, **changes):
    """Four steps of GRPO from random parameters, a checkpoint at each."""
    config = toy_config(cache_folder)
    return dataclasses.replace(
        config,
        pretrain=SupervisedConfig(),
        cold_start=SupervisedConfig(),
        evaluation=dataclasses.replace(config.evaluation, splits=("test",)),
        checkpoint=dataclasses.replace(config.checkpoint, save_every=1),
        **changes,
    )


def build(config, workdir, **programs):
    """A run; `programs` are functions that are given the program they take the place of."""
    run = run_lib.build_run(config, workdir, run_lib.needed_splits(config))
    changed = {name: wrap(getattr(run.programs, name)) for name, wrap in programs.items()}
    return dataclasses.replace(run, programs=dataclasses.replace(run.programs, **changed))


def go(run):
    with jax.set_mesh(run.mesh):
        return train.train(run, run_lib.open_metrics(run))


def reward_parity(_):
    """A grade that random completions vary in: whether the first token is odd."""

    def grade(rollouts, labels):
        return Rewards(total=(rollouts.completion_ids[:, 0] % 2).astype(jnp.float32), rules={})

    return grade


def test_groups_of_equal_rewards_are_sampled_again(cache_folder, tmp_path):
    config = grpo_only(cache_folder)
    run = build(config, tmp_path / "run", grade=reward_parity)
    records = run.records["train"][:16]

    def sample(max_resamples):
        settings = dataclasses.replace(config, train=dataclasses.replace(config.train, max_resamples=max_resamples))
        rollouts, stats = sample_groups(dataclasses.replace(run, config=settings), params, records, prompts, key)
        ids = np.asarray(rollouts.completion_ids).reshape(16, GROUP, -1)
        return ids, np.ptp(ids[:, :, 0] % 2, axis=1) == 0, stats["rollout/resampled_groups"]

    with jax.set_mesh(run.mesh):
        params, key = run.programs.sampler_params(run.initial_params()), jax.random.key(5)
        prompts = run.prompts(records, config_lib.num_blocks(config))
        first, was_constant, none = sample(0)
        once, still_constant, count = sample(1)
        often, constant, total = sample(4)
        fresh = run.programs.sampler.generate(params, prompts, jax.random.fold_in(key, 1))[0].completion_ids
    assert none == 0 and 0 < was_constant.sum() < 16 and count == was_constant.sum()
    np.testing.assert_array_equal(once[~was_constant], first[~was_constant])
    np.testing.assert_array_equal(once[was_constant], np.asarray(fresh).reshape(first.shape)[was_constant])
    np.testing.assert_array_equal(often[~still_constant], once[~still_constant])
    assert constant.sum() <= still_constant.sum() < was_constant.sum() and total >= count


def test_groups_that_stay_equal_are_kept_after_the_last_attempt(cache_folder, tmp_path):
    """An untrained policy earns nothing: all groups stay equal, and the run goes on."""
    config = grpo_only(cache_folder)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, max_resamples=2, num_steps=1))
    assert go(build(config, tmp_path / "run")) == 0
    (row,) = metrics_of(tmp_path / "run")
    assert row["rollout/resampled_groups"] == 2 * 16 and row["advantage/zero_variance_fraction"] == 1


def breaks_in(*broken):
    """Scores without numbers for the reference in the steps of these numbers: the KL term breaks the gradient."""

    def wrap(score):
        calls = []

        def breaking(*arguments):
            calls.append(None)
            experience, rewards, stats = score(*arguments)
            if len(calls) in broken:
                nothing = jnp.full_like(experience.reference_logps, jnp.nan)
                experience = dataclasses.replace(experience, reference_logps=nothing)
            return experience, rewards, stats

        return breaking

    return wrap


def test_a_broken_step_is_skipped_and_counted(cache_folder, tmp_path):
    run = build(grpo_only(cache_folder), tmp_path / "run", score=breaks_in(2))
    assert go(run) == 0
    rows = metrics_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["update/skipped_steps"] for row in rows] == [0, 2, 0, 0]
    assert ["policy/loss" in row for row in rows] == [True, False, True, True]


def test_broken_steps_in_a_row_stop_the_run(cache_folder, tmp_path):
    config = grpo_only(cache_folder)
    assert config.train.max_skipped_steps == 3 and config.policy_update.num_minibatches == 2
    run = build(config, tmp_path / "run", score=breaks_in(2, 3))
    with pytest.raises(NonFiniteError, match="grpo step 3: "):
        go(run)
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1, 2]
    assert run_lib.build_run(config, tmp_path / "run", ()).store.latest().step == 2


def test_only_steps_below_the_limit_lose_their_broken_numbers():
    good = {"update/skipped_steps": 0.0, "update/skipped_in_row": 0.0, "policy/loss": float("nan")}
    assert drop_broken(good, "grpo", 1, 2) == good, "a number that broke without a skipped step is an error"
    skipped = {"update/skipped_steps": 1.0, "update/skipped_in_row": 1.0, "policy/loss": float("inf"), "x": 1.0}
    assert drop_broken(skipped, "grpo", 1, 2).keys() == skipped.keys() - {"policy/loss"}
    assert drop_broken(skipped, "grpo", 1, 1) == skipped


def test_throughput_by_hand():
    metrics = {"update/real_tokens": 1000.0, "time/score_seconds": 1.0, "time/update_seconds": 3.0}
    metrics["time/generate_seconds"] = 4.0
    assert throughput(metrics, Config(), 50.0) == {"time/tokens_per_second": 125.0}
    # One pass forward for the reference (2), one update (6): 8 FLOPs x 50 parameters x 1000 tokens in 4 s on 2 devices.
    config = Config(mesh=MeshConfig(data=2, peak_flops=1e6))
    assert throughput(metrics, config, 50.0)["time/mfu_estimate"] == pytest.approx(8 * 50 * 1000 / (4 * 2e6))
    config = dataclasses.replace(config, loss=LossConfig(kl_estimator="none", kl_coefficient=0.0))
    assert throughput(metrics, config, 50.0)["time/mfu_estimate"] == pytest.approx(6 * 50 * 1000 / (4 * 2e6))


def test_matmul_size_is_that_of_the_decoder(cache_folder, tmp_path):
    run = run_lib.build_run(grpo_only(cache_folder), tmp_path / "run", ())
    text = run.model.text
    layer = 32 * 16 * (2 + 1 + 1 + 2) + 3 * 32 * 32 + 2 * 32 + 2 * 16  # q k v o, mlp, norms
    assert text_matmul_size(run) == text.vocab_size * 32 + 2 * layer + 32


def test_packed_adapting_resampling_runs_resume_exactly(cache_folder, tmp_path):
    config = grpo_only(
        cache_folder,
        packing=PackingConfig(row_len=64, rows=8, share_prompts=True),
        loss=dataclasses.replace(toy_config(cache_folder).loss, kl_target=1e-4),
    )
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, max_resamples=1))
    config_lib.validate(config)
    assert go(build(config, tmp_path / "whole")) == 0

    def stop_after_two(update):
        calls = []

        def stopping(*arguments):
            calls.append(None)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(*arguments)

        return stopping

    assert go(build(config, tmp_path / "parts", update=stop_after_two)) == signal.SIGTERM
    assert go(build(config, tmp_path / "parts")) == 0
    rows = metrics_of(tmp_path / "whole")
    assert metrics_of(tmp_path / "parts") == rows
    coefficients = [row["policy/kl_coefficient"] for row in rows]
    assert coefficients[0] == pytest.approx(config.loss.kl_coefficient) and len(set(coefficients)) == 4
    assert all(row["update/token_efficiency"] > 0.5 for row in rows)
