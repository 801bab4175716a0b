"""`Config`: the whole run as one tree of frozen dataclasses, made from a ConfigDict and checked once.

Each stage's dataclass lives beside its code; this module only joins them, refuses what does not fit together, and
is the last place that sees a ConfigDict. `configs/base.py` spells every key out with its meaning.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from safegrpo_jax.checkpoint import CheckpointConfig
from safegrpo_jax.data.processor import ProcessorConfig
from safegrpo_jax.data.sources import DataConfig
from safegrpo_jax.grpo.advantages import AdvantageConfig
from safegrpo_jax.grpo.loss import LossConfig
from safegrpo_jax.grpo.optimizer import OptimizerConfig
from safegrpo_jax.grpo.packing import PackingConfig
from safegrpo_jax.grpo.update import UpdateConfig
from safegrpo_jax.models import attention, grouped
from safegrpo_jax.models.lora import LoraConfig
from safegrpo_jax.models.qwen_vl import PUBLISHED_SIZES, QwenVLConfig
from safegrpo_jax.rewards.compose import RewardConfig
from safegrpo_jax.sampling.rollout import SamplingConfig
from safegrpo_jax.sft import SupervisedConfig
from safegrpo_jax.sharding import BATCH_AXES, ShardingConfig


@dataclasses.dataclass(frozen=True)
class SmallModelConfig:
    """The embedded Qwen3-VL, trained from nothing when `model.path` is empty. Names as in `QwenVLConfig`."""

    text_width: int = 128
    text_layers: int = 4
    text_heads: int = 4
    text_kv_heads: int = 2
    text_head_dim: int = 32
    text_mlp_width: int = 384
    vision_width: int = 64
    vision_layers: int = 3
    vision_heads: int = 4
    vision_mlp_width: int = 256
    deepstack_layers: tuple[int, ...] = (0, 1)
    position_table_size: int = 64


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Where the policy comes from and how it computes.

    `path`: a Qwen-VL folder in Hugging Face format, or "" for the embedded small model. `size`: a name of
    `qwen_vl.PUBLISHED_SIZES` that the folder must hold; enough for --mode=plan, which needs no folder.
    `compute_dtype`: of activations; parameters are float32. `freeze_vision`: GRPO leaves the vision tower as it is; the
    supervised stages train it. `logits_chunk`: tokens whose logits exist at a time in log-probabilities, 0 for all.
    `attention`: "reference", or on a TPU "splash". `experts`, of a mixture: "ragged_dot", or on a TPU "megablox".
    `lora`: train adapters of a checkpoint's projections instead of its weights.
    """

    path: str = ""
    size: str = ""
    compute_dtype: str = "float32"
    freeze_vision: bool = False
    remat: bool = False
    scan_layers: bool = False
    logits_chunk: int = 0
    attention: str = "reference"
    experts: str = "ragged_dot"
    lora: LoraConfig = LoraConfig()
    small: SmallModelConfig = SmallModelConfig()


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices and how they are laid out; the axis sizes multiply to the number of devices.

    `platform`: "cpu", "tpu", or "" for what jax finds. `cpu_devices`: host devices to make of a CPU (on two cores, two
    devices with the batch split between them decode twice as fast as one device with two threads). `data`, `fsdp`:
    the batch is spread over both, parameters over `fsdp`; `tensor`: heads and mlp; `expert`: experts of a mixture.
    `sampling_tensor`: the same for sampling, which never spreads a parameter over the batch's devices: a decode step
    would gather it for every token. 0 is `tensor`.
    `peak_flops`: FLOP/s of one device, for the metrics' estimate of its use; 0 for none.
    """

    platform: str = ""
    cpu_devices: int = 0
    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    sampling_tensor: int = 0
    peak_flops: float = 0.0

    @property
    def data_parallel(self) -> int:
        """Parts that a batch is cut into."""
        return self.data * self.fsdp

    @property
    def axis_sizes(self) -> dict[str, int]:
        return {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor, "expert": self.expert}

    @property
    def sampling_axis_sizes(self) -> dict[str, int]:
        """The same devices as sampling sees them."""
        tensor = self.sampling_tensor or self.tensor
        return {**self.axis_sizes, "data": self.data_parallel * self.tensor // tensor, "fsdp": 1, "tensor": tensor}

    @property
    def batch_axes(self) -> tuple[str, ...]:
        return BATCH_AXES


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The GRPO stage. One step = one rollout batch of `prompts_per_step` prompts x `sampling.group_size` samples.

    `replay_batch` plain questions per step join the loss with weight `loss.replay_weight`, a block for each mini-batch.
    Rollout files are written every `dump_rollouts_every` steps and for the last step. Groups whose rewards are all
    equal are sampled again up to `max_resamples` times a step; those that stay so train nothing. An optimizer step with
    a broken gradient is skipped; `max_skipped_steps` in a row stop the run, in any stage.
    """

    num_steps: int = 180
    prompts_per_step: int = 256
    replay_batch: int = 0
    replay_split: str = "pretrain"
    dump_rollouts_every: int = 10
    max_resamples: int = 0
    max_skipped_steps: int = 3


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Greedy and sampled evaluation before and after GRPO.

    `splits`: names to evaluate. `batch_size`: prompts of a greedy batch. `sampled_records`: the first so many records
    of a split are also sampled like training rollouts, for the sampled mean reward. `save_rows`: rows of a split
    written for the report.
    `validate_every` steps of GRPO the `validation_split` is scored into the metrics; 0 is off.
    """

    validate_every: int = 0
    validation_split: str = "validation"
    splits: tuple[str, ...] = ("test",)
    batch_size: int = 64
    sampled_records: int = 64
    save_rows: int = 64


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole run. See `configs/base.py` for every key with its meaning."""

    seed: int = 0
    cache_folder: str = "~/.cache/safegrpo_jax"
    tensorboard: bool = True
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    processor: ProcessorConfig = ProcessorConfig()
    pretrain: SupervisedConfig = SupervisedConfig()
    cold_start: SupervisedConfig = SupervisedConfig()
    train: TrainConfig = TrainConfig()
    sampling: SamplingConfig = SamplingConfig()
    rewards: RewardConfig = RewardConfig()
    advantages: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    policy_update: UpdateConfig = UpdateConfig()
    packing: PackingConfig = PackingConfig()
    mesh: MeshConfig = MeshConfig()
    sharding: ShardingConfig = ShardingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()


def to_config_dict(config: Any = None) -> ConfigDict:
    """Turns a dataclass tree (default: `Config()`) into a ConfigDict of the same keys."""

    def plain(value):
        if dataclasses.is_dataclass(value):
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return value

    return ConfigDict(plain(Config() if config is None else config))


def from_config_dict(values: ConfigDict) -> Config:
    """Makes a checked `Config`.

    Raises:
      ValueError: an unknown key (with the nearest known one), a wrong type, or stages that do not fit together.
    """
    plain = values.to_dict()
    for stage in ("pretrain", "cold_start"):  # a stage of 0 steps is left out, whatever schedule it would have had
        if stage in plain and isinstance(plain[stage], dict) and plain[stage].get("num_steps") == 0:
            plain[stage].pop("optimizer", None)
    config = _build(Config, plain, "config")
    validate(config)
    return config


def _build(cls: type, values: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise ValueError(f"{where}.{key}: no such key{suggestion(key, hints)}")
    return cls(**{key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def suggestion(key: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' for a mistyped key, or the list of what exists."""
    known = list(known)
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known keys: {', '.join(sorted(known))}"


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a section of keys, got {value!r}")
        return _build(hint, value, where)
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in typing.get_args(hint):
            return None
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
        return _convert(hint, value, where)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            raise ValueError(f"{where}: {value!r} is not one of {', '.join(map(repr, typing.get_args(hint)))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}: expected a tuple, got {value!r}")
        inner = typing.get_args(hint)
        item = inner[0] if inner else object
        return tuple(_convert(item, element, f"{where}[{i}]") for i, element in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a section of keys, got {value!r}")
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise ValueError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def validate(config: Config) -> None:
    """Cross-stage checks: every message names the keys and the remedy.

    Raises:
      ValueError: stages that do not fit together.
    """
    prompts, update = config.train.prompts_per_step, config.policy_update
    blocks = num_blocks(config)
    if prompts % blocks:
        raise ValueError(
            f"config.train.prompts_per_step={prompts} must be a multiple of {blocks} = policy_update.num_minibatches "
            f"({update.num_minibatches}) x policy_update.num_microbatches ({update.num_microbatches}) x data x fsdp "
            f"({config.mesh.data_parallel})"
        )
    mesh = config.mesh
    num_devices = mesh.data_parallel * mesh.tensor
    if mesh.sampling_tensor % mesh.tensor or num_devices % (mesh.sampling_tensor or 1):
        raise ValueError(
            f"config.mesh.sampling_tensor={mesh.sampling_tensor} must be a multiple of mesh.tensor={mesh.tensor} that "
            f"divides data x fsdp x tensor = {num_devices}, or 0"
        )
    for key, size in (
        ("pretrain.batch_size", config.pretrain.batch_size),
        ("cold_start.batch_size", config.cold_start.batch_size),
        ("evaluation.batch_size", config.evaluation.batch_size),
    ):
        if size % config.mesh.data_parallel:
            raise ValueError(f"config.{key}={size} must be a multiple of data x fsdp = {config.mesh.data_parallel}")
    if config.train.replay_batch % blocks:
        raise ValueError(
            f"config.train.replay_batch={config.train.replay_batch} must be a multiple of {blocks}, as prompts_per_step"
        )
    if config.sampling.group_size < 2 and config.train.num_steps:
        raise ValueError("config.sampling.group_size must be at least 2: the advantage is relative to the group")
    for key, least in (("max_resamples", 0), ("max_skipped_steps", 1)):
        if getattr(config.train, key) < least:
            raise ValueError(f"config.train.{key}={getattr(config.train, key)}: use a number >= {least}")
    if config.data.on_bad_row not in ("raise", "skip"):
        raise ValueError(f"config.data.on_bad_row={config.data.on_bad_row!r}: use 'raise' or 'skip'")
    if config.model.compute_dtype not in ("float32", "bfloat16"):
        raise ValueError(f"config.model.compute_dtype={config.model.compute_dtype!r}: use 'float32' or 'bfloat16'")
    for key, allowed in (("attention", attention.IMPLEMENTATIONS), ("experts", grouped.IMPLEMENTATIONS)):
        value = getattr(config.model, key)
        if value not in allowed:
            raise ValueError(f"config.model.{key}={value!r}: use one of {', '.join(map(repr, allowed))}")
    if config.model.size and config.model.size not in PUBLISHED_SIZES:
        known = suggestion(config.model.size, PUBLISHED_SIZES)
        raise ValueError(f"config.model.size={config.model.size!r}: no such published model{known}")
    lora, supervised = config.model.lora, config.pretrain.num_steps or config.cold_start.num_steps
    if lora.rank and not (config.model.path or config.model.size):
        raise ValueError(f"config.model.lora.rank={lora.rank} adapts a trained model: set config.model.path, or rank 0")
    if lora.rank and lora.vision_projections and config.model.freeze_vision and not supervised:
        raise ValueError(
            f"config.model.lora.vision_projections={lora.vision_projections} would never be trained, since "
            "freeze_vision=True keeps the vision tower as it is: set one of the two otherwise"
        )
    if bool(config.loss.replay_weight) != bool(config.train.replay_batch):
        raise ValueError("config.loss.replay_weight and config.train.replay_batch go together: set both, or neither")
    if config.loss.ratio_anchor == "policy" and update.num_minibatches * update.num_epochs > 1:
        raise ValueError(
            "config.loss.ratio_anchor='policy' holds the ratio at 1, which is right with one update per batch only: set"
            " policy_update.num_minibatches and num_epochs to 1, or ratio_anchor to 'proximal'"
        )
    if config.loss.kl_in_reward and config.advantages.normalize != "total":
        raise ValueError(
            f"config.loss.kl_in_reward changes the total reward, which advantages.normalize="
            f"{config.advantages.normalize!r} does not read: set it to 'total', or kl_in_reward to False"
        )
    if config.rewards.overlong_buffer > config.sampling.max_new_tokens:
        raise ValueError(
            f"config.rewards.overlong_buffer={config.rewards.overlong_buffer} exceeds sampling.max_new_tokens="
            f"{config.sampling.max_new_tokens}, of which it is a part; make it smaller"
        )
    _validate_packing(config)
    if config.processor.completion_buckets[-1] < config.sampling.max_new_tokens:
        raise ValueError(
            f"config.sampling.max_new_tokens={config.sampling.max_new_tokens} exceeds the largest of "
            f"processor.completion_buckets {config.processor.completion_buckets}"
        )


def _validate_packing(config: Config) -> None:
    packing, longest = config.packing, config.processor.prompt_buckets[-1] + config.sampling.max_new_tokens
    if packing.share_prompts and config.model.attention != "reference":
        raise ValueError("config.packing.share_prompts needs model.attention='reference': set that, or it to False")
    if not packing.row_len:
        return
    if packing.row_len < longest:
        raise ValueError(
            f"config.packing.row_len={packing.row_len} must hold the longest rollout: processor.prompt_buckets[-1] + "
            f"sampling.max_new_tokens = {longest}"
        )
    if packing.rows % config.mesh.data_parallel:
        raise ValueError(
            f"config.packing.rows={packing.rows} must be a multiple of data x fsdp = {config.mesh.data_parallel}"
        )
    if config.loss.normalizer != "global":
        raise ValueError("config.loss.normalizer='micro' is not defined for packed rows: set 'global', or row_len to 0")


def executed(model: QwenVLConfig, settings: ModelConfig) -> QwenVLConfig:
    """The model as `settings` want it computed."""
    return dataclasses.replace(
        model,
        dtype=settings.compute_dtype,
        scan_layers=settings.scan_layers,
        remat=settings.remat,
        attention=settings.attention,
        experts=settings.experts,
        lora=settings.lora,
    )


def check_size(model: QwenVLConfig, settings: ModelConfig) -> None:
    """Compares a checkpoint's `model` with the published one that `settings.size` names, if any.

    Raises:
      ValueError: they differ; names the first field.
    """
    if not settings.size:
        return
    published = PUBLISHED_SIZES[settings.size]
    for part in ("vision", "text"):
        ours, theirs = (dataclasses.asdict(getattr(which, part)) for which in (published, model))
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                raise ValueError(
                    f"config.model.size={settings.size!r} has {part} {name} {ours.get(name)}, the checkpoint in "
                    f"config.model.path={settings.path!r} {theirs.get(name)}; name the size of the checkpoint"
                )


def num_blocks(config: Config) -> int:
    """Blocks of prompts with packing rows of their own: one per (mini-batch, micro-batch, data-parallel device)."""
    return config.policy_update.num_minibatches * config.policy_update.num_microbatches * config.mesh.data_parallel


def to_json(config: Config) -> str:
    """Canonical JSON of the config: the same text for the same run, on any machine."""
    return json.dumps(dataclasses.asdict(config), sort_keys=True, indent=1)


def config_sha256(config: Config) -> str:
    """Hash of `to_json`."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()


def cache_folder(config: Config) -> Path:
    """Folder of compiled programs and reward tables, shared by all runs of a user."""
    return Path(config.cache_folder).expanduser()
