"""Whole runs at toy size: what they leave, equal seeds, interruption and resumption, sampling from a checkpoint."""

import json
import os
import signal
import threading
import time

import jax
import numpy as np
import pytest

from configs import cpu_demo
from safegrpo_jax import config as config_lib
from safegrpo_jax import run as run_lib
from safegrpo_jax import train
from safegrpo_jax.metrics import TAG_NAMES
from safegrpo_jax.rewards.automaton import build_tables
from safegrpo_jax.rewards.compose import compute_rewards
from safegrpo_jax.rewards.spans import scan
from safegrpo_jax.types import Labels

TIMINGS = "time/"  # the only metrics that may differ between equal runs


def toy_config(cache_folder, **train_changes):
    values = cpu_demo.get_config("smoke")
    values.cache_folder = str(cache_folder)
    values.mesh.data = values.mesh.cpu_devices = 8
    small = values.model.small
    small.text_width = small.text_mlp_width = small.vision_width = small.vision_mlp_width = 32
    small.text_layers, small.text_heads, small.text_kv_heads, small.text_head_dim = 2, 2, 1, 16
    small.vision_layers, small.vision_heads, small.deepstack_layers = 2, 2, (0,)
    values.data.num_pretrain = values.data.num_cold_start = values.data.num_train = 48
    values.data.num_evaluation = 16
    values.pretrain.num_steps, values.cold_start.num_steps, values.train.num_steps = 3, 3, 4
    values.pretrain.batch_size = values.cold_start.batch_size = 16
    values.pretrain.log_every = values.cold_start.log_every = 1
    values.train.prompts_per_step = values.train.replay_batch = 16
    values.sampling.group_size, values.sampling.max_new_tokens = 2, 12
    values.evaluation.batch_size = values.evaluation.sampled_records = 16
    values.evaluation.splits = ("test", "questions")
    values.checkpoint.save_every = 3
    values.train.update(train_changes)
    return config_lib.from_config_dict(values)


def run_once(config, workdir):
    run = run_lib.build_run(config, workdir, run_lib.needed_splits(config))
    with jax.set_mesh(run.mesh):
        return train.train(run, run_lib.open_metrics(run))


def metrics_of(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(TIMINGS)} for row in rows]


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache_folder):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert run_once(toy_config(cache_folder), workdir) == 0
    return workdir


def test_a_run_leaves_everything(finished):
    summary = json.loads((finished / "summary.json").read_text())
    for moment in ("before", "after"):
        assert set(summary[moment]) == {"test", "questions"}
        assert {"combined_accuracy", "refusal_rate", "format_rate", "mean_reward", "sampled_mean_reward"} <= set(
            summary[moment]["test"]
        )
        assert summary[moment]["questions"]["answer_accuracy"]["count"] == 16
    assert summary["seed"] == 0 and summary["wall_seconds"] > 0 and summary["peak_rss_bytes"] > 1e8
    assert summary["config_sha256"] and "jax" in summary["packages"]
    stages = [(row["stage"], row["step"]) for row in metrics_of(finished)]
    lengths = {"pretrain": 3, "cold_start": 3, "grpo": 4}
    assert stages == [(stage, step) for stage, last in lengths.items() for step in range(1, last + 1)]
    for name in ("report.html", "rollouts/step_000004.jsonl", "export/model.safetensors", "export/tokenizer.json"):
        assert (finished / name).stat().st_size > 0
    assert list((finished / "tensorboard" / "grpo").glob("events*"))


def test_rows_hold_what_recomputes_their_reward(finished, cache_folder):

    config = toy_config(cache_folder)
    run = run_lib.build_run(config, finished, ())
    tables = build_tables("reference", run.token_bytes)
    rows = [json.loads(line) for line in (finished / "rollouts" / "step_000004.jsonl").read_text().splitlines()]
    assert len(rows) == 32
    width = max(len(row["completion_ids"]) for row in rows)
    ids = np.array([row["completion_ids"] + [0] * (width - len(row["completion_ids"])) for row in rows], np.int32)
    mask = np.array([[i < len(row["completion_ids"]) for i in range(width)] for row in rows])
    tags = {tag: np.array([row["labels"][tag] == "unsafe" for row in rows], np.int32) for tag in TAG_NAMES}
    labels = Labels(**tags, tagged=np.ones(len(rows), bool))
    rewards = compute_rewards(scan(tables, ids, mask), labels, config.rewards)
    assert rewards.total.tolist() == [row["reward"] for row in rows]


def test_the_same_seed_gives_the_same_digits(finished, cache_folder, tmp_path):
    assert run_once(toy_config(cache_folder), tmp_path / "again") == 0
    assert metrics_of(tmp_path / "again") == metrics_of(finished)
    after = [(folder / "evaluation" / "after.json").read_text() for folder in (tmp_path / "again", finished)]
    assert after[0] == after[1]


@pytest.mark.parametrize(("stage", "number"), [("cold_start", signal.SIGINT), ("grpo", signal.SIGTERM)])
def test_a_signal_saves_and_the_same_command_goes_on(stage, number, finished, cache_folder, tmp_path):
    config, workdir = toy_config(cache_folder), tmp_path / "run"

    def interrupt_in_stage():
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            written = (workdir / "metrics.jsonl").read_text() if (workdir / "metrics.jsonl").is_file() else ""
            if f'"stage": "{stage}", "step": 1,' in written:
                os.kill(os.getpid(), number)
                return
            time.sleep(0.005)

    watcher = threading.Thread(target=interrupt_in_stage)
    watcher.start()
    assert run_once(config, workdir) == number
    watcher.join()
    assert not (workdir / "summary.json").exists()
    assert run_once(config, workdir) == 0
    assert metrics_of(workdir) == metrics_of(finished)
    assert len((workdir / "sessions.jsonl").read_text().splitlines()) == 2


def test_grpo_leaves_a_frozen_tower_as_it_is(finished, cache_folder):
    run = run_lib.build_run(toy_config(cache_folder), finished, ())
    assert run.config.model.freeze_vision
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        run.programs.abstract_params,
        run.programs.param_shardings,
    )
    before = run.store.restore_params(run.store.finished("cold_start"), abstract)
    moved = jax.tree.map(lambda old, new: bool((old != new).any()), before, train.latest_params(run))
    assert not any(jax.tree.leaves(moved["vision"])) and all(jax.tree.leaves(moved["text"]))
    reference = run.programs.freeze(before)  # shares the tower with the policy
    assert not jax.tree.leaves(reference["vision"])
    jax.tree.map(np.testing.assert_array_equal, reference["text"], before["text"])


def test_another_config_does_not_resume(finished, cache_folder):
    config = toy_config(cache_folder, num_steps=5)
    with pytest.raises(ValueError, match="train.num_steps was 4, is 5"):
        run_once(config, finished)


def test_sample_speaks_about_an_image(finished, cache_folder):
    run = run_lib.build_run(toy_config(cache_folder), finished, ())
    image = next((finished / "rollouts" / "images").glob("*.png"))
    with jax.set_mesh(run.mesh):
        assert isinstance(train.sample(run, image, "Is this safe to touch?"), str)
        with pytest.raises(OSError):
            train.sample(run, image.with_name("missing.png"), "Hello")
        with pytest.raises(ValueError, match=r"--image=.*summary.json: not a readable image"):
            train.sample(run, finished / "summary.json", "Hello")


def test_sample_without_a_checkpoint_says_so(cache_folder, tmp_path):
    run = run_lib.build_run(toy_config(cache_folder), tmp_path / "new", ())
    with pytest.raises(ValueError, match="has no checkpoint; run --mode=train first"):
        train.latest_params(run)
