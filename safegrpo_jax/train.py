"""The stages of a run in order, each resumable at any step, and the evaluations around GRPO.

pretrain and cold_start imitate demonstrations; grpo samples, scores and updates. The data and noise of a step depend on
(seed, stage, step) alone, so a resumed run repeats nothing and skips nothing. Ctrl-C or SIGTERM stops at the next
step with a checkpoint. With several processes all run this same code; process 0 writes and prints.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from safegrpo_jax import config as config_lib
from safegrpo_jax import processes
from safegrpo_jax.checkpoint import SavedStep, package_versions
from safegrpo_jax.data.images import check_image
from safegrpo_jax.data.pipeline import batches
from safegrpo_jax.data.records import Record
from safegrpo_jax.evaluation.rows import rollout_rows
from safegrpo_jax.evaluation.scores import Scores, before_after_table, bootstrap_mean_interval, score_split
from safegrpo_jax.evaluation.splits import run_split
from safegrpo_jax.metrics import (
    MetricsWriter,
    Progress,
    peak_rss_bytes,
    save_image,
    write_evaluation,
)
from safegrpo_jax.report.html import write_report
from safegrpo_jax.run import Run
from safegrpo_jax.sharding import with_shardings
from safegrpo_jax.step import drop_broken, grpo_step
from safegrpo_jax.types import Labels, Params, Rewards, Rollouts, TrainState

STREAM_SEEDS = {"pretrain": 1, "cold_start": 2, "grpo": 3, "replay": 4}


class Interrupted(Exception):
    """Raised between two steps, after a checkpoint, with the signal by which a person or the platform asked to stop."""


def train(run: Run, writer: MetricsWriter) -> int:
    """Runs what is left of the run; 0 when it is complete, else the signal that interrupted it: it can be resumed.

    `writer` from `run.open_metrics`; it and the run's checkpoints are closed at the end.
    """
    try:
        with processes.StopRequest() as stop:
            pretrained = functools.partial(_run_supervised, run, writer, "pretrain", run.initial_params, stop)
            params = _run_supervised(run, writer, "cold_start", pretrained, stop)
            evaluate(run, params, "before")
            params = _run_grpo(run, writer, params, stop)
            evaluate(run, params, "after")
            run.export(params)
    except Interrupted as interrupted:
        return interrupted.args[0]
    finally:
        run.store.close()
        writer.close()
        if processes.is_first():
            _note_session(run, time.monotonic() - run.started)
    if processes.is_first():
        write_summary(run)
        write_report(run.workdir, run.workdir / "report.html")
    return 0


def stream(run: Run, name: str, records: Sequence[Record], batch_size: int, start: int) -> Iterator[list[Record]]:
    """Batches of records of one stream, from step `start` on."""
    seed = run.config.seed * len(STREAM_SEEDS) + STREAM_SEEDS[name]
    for _, indices in batches(len(records), batch_size, seed, start):
        yield [records[i] for i in indices]


def _run_supervised(
    run: Run, writer: MetricsWriter, stage: str, before: Callable[[], Params], stop: processes.StopRequest
) -> Params:
    """Parameters after a supervised stage; `before` gives those it starts from, if it has to start."""
    settings = getattr(run.config, stage)
    if not settings.num_steps:
        return before()
    if finished := run.store.finished(stage):
        return run.store.restore_params(finished, _abstract_params(run))
    state = _resume(run, stage) or run.programs.init_state[stage](before())
    start = int(state.step)
    data = stream(run, stage, run.records[stage], settings.batch_size, start)
    progress = _open_progress(stage, settings.num_steps, start)
    num_blocks = settings.num_microbatches * run.config.mesh.data_parallel
    for step in range(start + 1, settings.num_steps + 1):
        demonstrations = run.demonstrations(next(data), num_blocks)
        state, metrics = run.programs.supervised[stage](state, demonstrations)
        reads = any(step % every == 0 for every in (settings.log_every, settings.checkpoint_every, settings.num_steps))
        stopping = stop.agreed(waits=reads)
        if reads or stopping:  # what is saved is finite
            metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
            metrics = drop_broken(metrics, stage, step, run.config.train.max_skipped_steps)
            writer.write(stage, step, metrics)
            progress.update(step, {"loss": metrics.get("supervised/loss", float("nan"))})
        _save_or_stop(run, stage, step, state, settings.checkpoint_every, stopping, progress)
    progress.close()
    run.store.finish(stage, state)
    return state.params


def _run_grpo(run: Run, writer: MetricsWriter, params: Params, stop: processes.StopRequest) -> Params:
    """Parameters after GRPO. Consumes `params`, its start and the fixed policy of the KL term."""
    settings = run.config.train
    if not settings.num_steps:
        return params
    if finished := run.store.finished("grpo"):
        return run.store.restore_params(finished, _abstract_params(run))
    reference = run.programs.freeze(params)
    if run.store.steps("grpo"):
        for leaf in jax.tree.leaves(params):  # the state brings its own: frozen leaves are held once
            leaf.delete()
        state = _resume(run, "grpo")
    else:
        state = run.programs.init_state["grpo"](params)
    start = int(state.step)
    data = stream(run, "grpo", run.records["train"], settings.prompts_per_step, start)
    replay = None
    if settings.replay_batch:
        replay = stream(run, "replay", run.records[settings.replay_split], settings.replay_batch, start)
    progress = _open_progress("grpo", settings.num_steps, start)
    run_key = jax.random.fold_in(jax.random.key(run.config.seed), STREAM_SEEDS["grpo"])
    for step in range(start + 1, settings.num_steps + 1):
        state, metrics = grpo_step(
            run,
            state,
            reference,
            next(data),
            next(replay) if replay else None,
            jax.random.fold_in(run_key, step),
            step,
        )
        if run.config.evaluation.validate_every and step % run.config.evaluation.validate_every == 0:
            metrics |= validate(run, state.params)
        metrics = drop_broken(metrics, "grpo", step, settings.max_skipped_steps)
        writer.write("grpo", step, metrics)
        shown = {"reward": metrics["reward/total_mean"], "KL": metrics.get("policy/kl", 0.0)}
        progress.update(step, shown, int(metrics["rollout/tokens"]))
        _save_or_stop(run, "grpo", step, state, run.config.checkpoint.save_every, stop.agreed(), progress)
    progress.close()
    run.store.finish("grpo", state)
    return state.params


def _resume(run: Run, stage: str) -> TrainState | None:
    """The state of the newest checkpoint of an unfinished stage."""
    steps = run.store.steps(stage)
    if not steps:
        return None
    abstract = jax.eval_shape(run.programs.init_state[stage], _abstract_params(run))
    placed = with_shardings(abstract, run.programs.state_shardings[stage])
    return run.store.restore(SavedStep(stage, steps[-1]), placed)


def _abstract_params(run: Run) -> Params:
    return with_shardings(run.programs.abstract_params, run.programs.param_shardings)


def _save_or_stop(
    run: Run, stage: str, step: int, state: TrainState, every: int, stopping: int, progress: Progress
) -> None:
    if step % every == 0 or stopping:
        run.store.save(stage, step, state)
    if stopping:
        progress.close()
        raise Interrupted(stopping)


def _open_progress(stage: str, num_steps: int, start: int) -> Progress:
    stream = sys.stdout if processes.is_first() else open(os.devnull, "w")
    return Progress(stream, stage, num_steps, start)


def run_greedy(run: Run, sampler_params: Params, records: Sequence[Record]) -> tuple[Rollouts, Rewards]:
    """One greedy completion of each record, with its reward."""
    prompts = run.prompts(records, run.config.mesh.data_parallel)
    rollouts, _ = run.programs.greedy_sampler.generate(sampler_params, prompts, jax.random.key(0))
    return rollouts, run.programs.grade(rollouts, prompts.labels)


def run_sampled(run: Run, sampler_params: Params, records: Sequence[Record]) -> tuple[Rollouts, Rewards]:
    """A group of samples of each record, drawn as in training, with their rewards."""
    prompts = run.prompts(records, config_lib.num_blocks(run.config))
    key = jax.random.fold_in(jax.random.key(run.config.seed), 0)
    rollouts, _ = run.programs.sampler.generate(sampler_params, prompts, key)
    return rollouts, run.programs.grade(rollouts, prompts.labels)


def score_records(run: Run, sampler_params: Params, records: Sequence[Record]) -> tuple[Scores, Rollouts, Rewards]:
    """Greedy scores of `records`."""
    batch_size = run.config.evaluation.batch_size
    rollouts, rewards = run_split(records, batch_size, lambda batch: run_greedy(run, sampler_params, batch))
    texts = [
        "" if record.tagged else run.processor.decode(rollouts.completion_ids[i, : rollouts.completion_len[i]].tolist())
        for i, record in enumerate(records)
    ]
    labels = Labels(
        *(
            np.array([getattr(record, name) == "unsafe" for record in records], np.int32)
            for name in ("image_tag", "text_tag", "combine_tag")
        ),
        tagged=np.array([record.tagged for record in records]),
    )
    answers = [record.answer for record in records]
    return score_split(rollouts.spans, labels, rewards.total, texts, answers), rollouts, rewards


def validate(run: Run, params: Params) -> dict[str, float]:
    """Greedy scores of the validation split as metrics."""
    records = run.records[run.config.evaluation.validation_split]
    scores, _, _ = score_records(run, run.programs.sampler_params(params), records)
    return {f"validation/{name}": value["value"] for name, value in scores.items()}


def evaluate(run: Run, params: Params, moment: str) -> dict[str, Scores]:
    """Scores of every split, kept in `evaluation/<moment>.json`; an evaluation that is there is not repeated."""
    path = run.workdir / "evaluation" / f"{moment}.json"
    if path.is_file():
        return json.loads(path.read_text())
    settings = run.config.evaluation
    sampler_params = run.programs.sampler_params(params)
    results = {}
    for split in settings.splits:
        records = run.records[split]
        scores, rollouts, rewards = score_records(run, sampler_params, records)
        if all(record.tagged for record in records):
            sampled = _sampled_rewards(run, sampler_params, records[: settings.sampled_records])
            low, high = bootstrap_mean_interval(sampled, seed=0)
            scores["sampled_mean_reward"] = {
                "value": float(sampled.mean()),
                "count": sampled.size,
                "low": low,
                "high": high,
            }
        results[split] = scores
        if not processes.is_first():
            continue
        kept = records[: settings.save_rows]
        images = [save_image(run.workdir, record.images[0]) if record.images else "" for record in kept]
        shown = jax.tree.map(lambda x, num_rows=settings.save_rows: x[:num_rows], (rollouts, rewards))
        step = run.config.train.num_steps if moment == "after" else 0
        write_evaluation(
            run.workdir, moment, split, rollout_rows(kept, images, *shown, run.processor, run.token_bytes, step)
        )
    if processes.is_first():
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_json(path, results)
    return results


def _sampled_rewards(run: Run, sampler_params: Params, records: Sequence[Record]) -> np.ndarray:
    batch_size = run.config.train.prompts_per_step
    _, rewards = run_split(records, batch_size, lambda batch: run_sampled(run, sampler_params, batch))
    return np.asarray(rewards.total, np.float64)


def write_summary(run: Run) -> dict:
    """Writes `summary.json`: both evaluations and the facts of the run."""
    evaluations = {
        moment: json.loads((run.workdir / "evaluation" / f"{moment}.json").read_text())
        for moment in ("before", "after")
    }
    sessions = [json.loads(line) for line in (run.workdir / "sessions.jsonl").read_text().splitlines()]
    summary = {
        **evaluations,
        "seed": run.config.seed,
        "wall_seconds": sum(session["seconds"] for session in sessions),
        "peak_rss_bytes": max(session["peak_rss_bytes"] for session in sessions),
        "config_sha256": config_lib.config_sha256(run.config),
        "packages": package_versions(),
    }
    _write_json(run.workdir / "summary.json", summary)
    return summary


def results_table(run: Run) -> str:
    """The before/after table of a finished run."""
    summary = json.loads((run.workdir / "summary.json").read_text())
    return before_after_table(summary["before"], summary["after"])


def latest_params(run: Run) -> Params:
    """Parameters of the newest checkpoint of the work directory.

    Raises:
      ValueError: there is none.
    """
    latest = run.store.latest()
    if latest is None:
        raise ValueError(f"{run.workdir} has no checkpoint; run --mode=train first, or name its --workdir")
    return run.store.restore_params(latest, _abstract_params(run))


def evaluate_checkpoint(run: Run) -> str:
    """Scores the newest checkpoint on every split and returns the path of `evaluation/checkpoint.json`."""
    path = run.workdir / "evaluation" / "checkpoint.json"
    with processes.first_alone("removing the scores of an earlier checkpoint"):
        path.unlink(missing_ok=True)
    evaluate(run, latest_params(run), "checkpoint")
    return str(path)


def sample(run: Run, image_file: Path, prompt: str) -> str:
    """The newest checkpoint's reasoning, tags and answer for one image and request, greedily.

    Raises:
      ValueError: no checkpoint, an image that cannot be read, or a prompt that is too long.
      OSError: no such image file.
    """
    image = image_file.read_bytes()
    try:
        check_image(image, run.config.data.max_image_pixels, run.config.data.max_image_bytes)
    except ValueError as error:
        raise ValueError(f"--image={image_file}: {error}") from error
    record = Record(prompt, (image,), text_tag="safe", image_tag="safe", combine_tag="safe")
    params = run.programs.sampler_params(latest_params(run))
    rollouts, _ = processes.fetch(run_greedy(run, params, [record] * run.config.mesh.data_parallel))
    return run.processor.decode(rollouts.completion_ids[0, : rollouts.completion_len[0]].tolist())


def _note_session(run: Run, seconds: float) -> None:
    with (run.workdir / "sessions.jsonl").open("a") as file:
        file.write(json.dumps({"seconds": round(seconds, 3), "peak_rss_bytes": peak_rss_bytes()}) + "\n")


def _write_json(path, value) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)
