"""Checkpoints of a run with several stages: atomic, pickle-free, hashed, readable on another device count.

Layout: `<workdir>/checkpoints/<stage>/<step>/{params,training,metadata,files.json}` and, once a stage is over,
`<stage>/finished.json`. Parameters are an item of their own, so that sampling, export and the frozen reference
policy load them without the optimizer. Orbax writes to a temporary name and renames; `files.json` (size and
SHA-256 of every file) comes last, and a step without it does not exist for any reader. Readers delete nothing:
what a killed run left behind goes at the next save. Which step to save, and how a stage works, is the caller's.

Source: orbax.checkpoint.CheckpointManager for the array format (OCDBT + zarr) and the rename protocol.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata as package_metadata
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers

from safegrpo_jax.processes import barrier, is_first
from safegrpo_jax.types import ArrayTree, Params, TrainState

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_HASHES = "files.json"
_FINISHED = "finished.json"


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, what to keep, and which config keys may differ between the runs of one work directory.

    `free_keys` are dotted config keys or their prefixes ("metrics" frees "metrics.wandb" too).
    """

    save_every: int = 10  # steps; the last step of a stage is always saved
    keep_last: int = 2  # at least 2: the older one is the way back if the newer one is damaged
    keep_every: int = 0  # also keep every multiple of this many steps for good; 0 = none
    asynchronous: bool = False  # write in the background; the hashes follow at the next save, `latest` or `close`
    free_keys: tuple[str, ...] = ()

    def __post_init__(self):
        if self.save_every < 1 or self.keep_last < 2 or self.keep_every < 0:
            raise ValueError(
                f"checkpoint config: save_every={self.save_every} must be >= 1, keep_last={self.keep_last} >= 2, "
                f"keep_every={self.keep_every} >= 0; correct the value out of range"
            )


@dataclasses.dataclass(frozen=True)
class SavedStep:
    """Names one complete checkpoint: the state after `step` finished steps of `stage`."""

    stage: str
    step: int


class Checkpoints:
    """The checkpoints of one work directory. Every process of a run constructs one and makes the same calls."""

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        config: CheckpointConfig,
        *,
        stages: Sequence[str],
        run_config: Mapping[str, Any],
        data_fingerprint: str,
    ):
        """`stages` in the order they run; `run_config` is the whole config as JSON types; nothing is written yet."""
        self._root = pathlib.Path(workdir).absolute() / "checkpoints"
        self._config = config
        self._stages = tuple(stages)
        self._run_config = json.loads(json.dumps(dict(run_config)))  # tuples become lists, as they come back
        self._data_fingerprint = data_fingerprint
        self._writers: dict[str, ocp.CheckpointManager] = {}
        self._unsealed: SavedStep | None = None

    def save(self, stage: str, step: int, state: TrainState, data_state: Mapping[str, Any] | None = None) -> SavedStep:
        """Saves `state` and the JSON state of the data iterator; a step that is saved already is left alone.

        Raises:
          ValueError: `stage` is unknown, or `step` is not the number of finished steps in `state`.
        """
        self.wait()
        saved = SavedStep(stage, step)
        if step in self.steps(stage):
            return saved
        if int(state.step) != step:
            raise ValueError(f"checkpoint {stage}/{step}: the state counts {int(state.step)} steps; pass that number")
        arrays = {"params": state.params, "training": _training(state)}
        metadata = {
            "stage": stage,
            "step": step,
            "config_sha256": config_sha256(self._run_config),
            "config": self._run_config,
            "data_fingerprint": self._data_fingerprint,
            "data_state": None if data_state is None else dict(data_state),
            "packages": package_versions(),
            "arrays": _describe(arrays),
        }
        items = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
        self._writer(stage).save(step, args=ocp.args.Composite(metadata=ocp.args.JsonSave(metadata), **items))
        self._unsealed = saved
        if not self._config.asynchronous:
            self.wait()
        return saved

    def maybe_save(
        self, stage: str, step: int, state: TrainState, data_state: Mapping[str, Any] | None = None
    ) -> SavedStep | None:
        """Saves when `step` is a multiple of `save_every`; returns what it saved."""
        return self.save(stage, step, state, data_state) if step % self._config.save_every == 0 else None

    def finish(self, stage: str, state: TrainState) -> SavedStep:
        """Saves the final state of a stage and marks the stage as done, so that a later run goes on after it."""
        saved = self.save(stage, int(state.step), state)
        self.wait()
        if is_first():
            _write_json(self._root / stage / _FINISHED, {"step": saved.step})
        barrier("checkpoint finish")
        return saved

    def finished(self, stage: str) -> SavedStep | None:
        """The final checkpoint of a stage that is done, else None.

        Raises:
          ValueError: the stage is marked as done, but its final checkpoint is gone.
        """
        marker = self._stage_dir(stage) / _FINISHED
        if not marker.exists():
            return None
        saved = SavedStep(stage, int(_read_json(marker)["step"]))
        if saved.step not in self.steps(stage):
            raise ValueError(
                f"{marker}: stage {stage!r} is marked finished at step {saved.step}, but that checkpoint is missing; "
                f"restore it, or delete {marker.name} to continue the stage from an earlier step"
            )
        return saved

    def steps(self, stage: str) -> list[int]:
        """Steps of the complete checkpoints of a stage, ascending."""
        folder = self._stage_dir(stage)
        if not folder.exists():
            return []
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit() and _is_complete(path))

    def latest(self) -> SavedStep | None:
        """The newest complete checkpoint of the latest stage that has one; None in a fresh work directory."""
        self.wait()
        for stage in reversed(self._stages):
            if steps := self.steps(stage):
                return SavedStep(stage, steps[-1])
        return None

    def metadata(self, saved: SavedStep) -> dict[str, Any]:
        """What was stored beside the arrays: config, data fingerprint and iterator state, package versions."""
        self._verify(saved)
        return self._read_metadata(saved)

    def restore(self, saved: SavedStep, abstract_state: TrainState, check_run: bool = True) -> TrainState:
        """Loads a checkpoint straight into the shardings of `abstract_state`.

        Args:
          saved: from `latest` or `finished`.
          abstract_state: arrays, or ShapeDtypeStructs that carry a sharding; any device count.
          check_run: refuse a checkpoint that another config or other data wrote. False to only look at a model.

        Raises:
          ValueError: the checkpoint is missing or damaged, belongs to another config or data set (the keys that
            differ are named), or holds other arrays than asked for.
        """
        self._verify(saved)
        metadata = self._read_metadata(saved)
        if check_run:
            self._check_run(saved, metadata)
        loaded = self._load(saved, metadata, {"params": abstract_state.params, "training": _training(abstract_state)})
        return TrainState(params=loaded["params"], **loaded["training"])

    def check_run(self, saved: SavedStep) -> None:
        """Raises ValueError where another config or other data wrote the checkpoint; names the keys that differ."""
        self._check_run(saved, self.metadata(saved))

    def restore_params(self, saved: SavedStep, abstract_params: Params) -> Params:
        """Loads the parameters alone, whatever config wrote them. Raises as `restore` does."""
        self._verify(saved)
        return self._load(saved, self._read_metadata(saved), {"params": abstract_params})["params"]

    def wait(self) -> None:
        """Returns when the last save is complete on disk, hashes included."""
        if self._unsealed is None:
            return
        self._writers[self._unsealed.stage].wait_until_finished()
        if is_first():
            folder = self._step_dir(self._unsealed)
            _write_json(folder / _HASHES, _hash_files(folder))
        barrier("checkpoint hashes")
        self._unsealed = None

    def close(self) -> None:
        """Completes the last save and stops background threads."""
        self.wait()
        for writer in self._writers.values():
            writer.close()
        self._writers = {}

    def _stage_dir(self, stage: str) -> pathlib.Path:
        if stage not in self._stages:
            raise ValueError(f"unknown stage {stage!r}; the stages of this run are {', '.join(self._stages)}")
        return self._root / stage

    def _step_dir(self, saved: SavedStep) -> pathlib.Path:
        return self._stage_dir(saved.stage) / str(saved.step)

    def _writer(self, stage: str) -> ocp.CheckpointManager:
        if stage not in self._writers:
            folder = self._stage_dir(stage)
            if is_first():
                folder.mkdir(parents=True, exist_ok=True)
                for path in folder.iterdir():
                    if path.is_dir() and not _is_complete(path):
                        logging.warning("removing the incomplete checkpoint %s", path)
                        shutil.rmtree(path)
            barrier("checkpoint folder")
            keep = [checkpoint_managers.LatestN(self._config.keep_last)]
            if self._config.keep_every:
                keep.append(checkpoint_managers.EveryNSteps(self._config.keep_every))
            options = ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
                save_decision_policy=checkpoint_managers.FixedIntervalPolicy(1),  # every call saves
                enable_async_checkpointing=self._config.asynchronous,
            )
            self._writers[stage] = ocp.CheckpointManager(folder, options=options)
        return self._writers[stage]

    def _verify(self, saved: SavedStep) -> None:
        """Raises ValueError unless every file of the checkpoint is there, byte for byte."""
        self.wait()
        folder = self._step_dir(saved)
        steps = self.steps(saved.stage)
        if saved.step not in steps:
            known = ", ".join(map(str, steps)) or "none"
            raise ValueError(f"no complete checkpoint {folder}; complete steps of stage {saved.stage!r}: {known}")
        expected, found = _read_json(folder / _HASHES), _hash_files(folder)
        wrong = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        if wrong:
            earlier = [step for step in steps if step < saved.step]
            remedy = f"resume from step {earlier[-1]}" if earlier else "start the stage again"
            what = "missing" if wrong[0] not in found else "changed"
            raise ValueError(
                f"checkpoint {folder} is damaged: {wrong[0]} is {what} ({len(wrong)} file(s) in all); "
                f"restore the files, or delete the folder to {remedy}"
            )

    def _read_metadata(self, saved: SavedStep) -> dict[str, Any]:
        return _read_json(self._step_dir(saved) / "metadata" / "metadata")  # where Orbax puts a JSON item

    def _load(self, saved: SavedStep, metadata: dict[str, Any], abstract: dict[str, ArrayTree]) -> dict[str, ArrayTree]:
        stored = {name: metadata["arrays"][name] for name in abstract}
        _check_arrays(str(self._step_dir(saved)), stored, _describe(abstract))
        with ocp.StandardCheckpointer() as reader:
            return {
                name: reader.restore(self._step_dir(saved) / name, _with_shardings(tree))
                for name, tree in abstract.items()
            }

    def _check_run(self, saved: SavedStep, metadata: dict[str, Any]) -> None:
        stored, now = _flatten(metadata["config"]), _flatten(self._run_config)
        free = self._config.free_keys
        changed = [
            f"{key} was {stored.get(key, 'absent')!r}, is {now.get(key, 'absent')!r}"
            for key in sorted({*stored, *now})
            if stored.get(key) != now.get(key) and not any(key == f or key.startswith(f"{f}.") for f in free)
        ]
        if metadata["data_fingerprint"] != self._data_fingerprint:
            changed.append("the data set has changed")
        if changed:
            raise ValueError(
                f"checkpoint {self._step_dir(saved)} was written by another config: {'; '.join(changed)}; "
                "set the old values, or choose another work directory"
            )
        if metadata["packages"] != (packages := package_versions()):
            logging.warning("checkpoint written with %s, now running %s", metadata["packages"], packages)


def config_sha256(run_config: Mapping[str, Any]) -> str:
    """SHA-256 of the config as JSON with sorted keys: equal for equal configs, in any order of keys."""
    return hashlib.sha256(json.dumps(run_config, sort_keys=True).encode()).hexdigest()


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers."""
    return {name: package_metadata.version(name) for name in _PACKAGES}


def _training(state: TrainState) -> dict[str, Any]:
    """All of a state but its parameters, which are kept apart so that a model can be read without the rest."""
    return {
        field.name: getattr(state, field.name) for field in dataclasses.fields(TrainState) if field.name != "params"
    }


def _is_complete(folder: pathlib.Path) -> bool:
    return (folder / _HASHES).exists()


def _hash_files(folder: pathlib.Path) -> dict[str, list]:
    """Relative path -> [size in bytes, SHA-256] of every file but the list itself."""
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != _HASHES:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            hashes[path.relative_to(folder).as_posix()] = [path.stat().st_size, digest]
    return hashes


def _write_json(path: pathlib.Path, value: Any) -> None:
    """Writes under a temporary name and renames, so that a reader sees all of it or none."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; restore it, or delete {path.parent} to go back") from error


def _describe(arrays: Mapping[str, ArrayTree]) -> dict[str, dict[str, str]]:
    """Item -> path of the array -> "dtype[shape]"."""
    return {
        item: {
            jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        }
        for item, tree in arrays.items()
    }


def _check_arrays(folder: str, stored: dict[str, dict[str, str]], wanted: dict[str, dict[str, str]]) -> None:
    have, want = ({f"{item}/{key}": v for item in tree for key, v in tree[item].items()} for tree in (stored, wanted))
    wrong = [
        f"{key} is stored as {have.get(key, 'nothing')}, wanted as {want.get(key, 'nothing')}"
        for key in sorted({*have, *want})
        if have.get(key) != want.get(key)
    ]
    if wrong:
        raise ValueError(
            f"checkpoint {folder} does not fit: {wrong[0]} ({len(wrong)} array(s) in all); "
            "use the model and optimizer config it was saved with"
        )


def _with_shardings(tree: ArrayTree) -> ArrayTree:
    def abstract(path, leaf):
        if getattr(leaf, "sharding", None) is None:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"cannot restore {name}: no sharding given; pass a ShapeDtypeStruct with a sharding")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    return jax.tree_util.tree_map_with_path(abstract, tree)


def _flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> {"a.b": value}."""
    if not isinstance(config, Mapping) or (prefix and not config):
        return {prefix: config}
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
