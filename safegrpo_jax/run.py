"""`Run`: what a command works with. Reads and checks every input before anything is written or compiled.

Owns the work directory's layout, beside the folders that checkpoint.py, metrics.py and report/ own:
`base_model/` (the embedded model's config.json and tokenizer), `data/` (the embedded data set), `evaluation/*.json`,
`sessions.jsonl` (seconds of each session), `export/`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from safegrpo_jax import config as config_lib
from safegrpo_jax import processes
from safegrpo_jax.checkpoint import Checkpoints
from safegrpo_jax.config import Config
from safegrpo_jax.data import demo_tokenizer
from safegrpo_jax.data.chat import ChatTokenizer
from safegrpo_jax.data.packing import share_of
from safegrpo_jax.data.processor import Processor
from safegrpo_jax.data.records import Record, write_bad_rows
from safegrpo_jax.data.sources import load_splits
from safegrpo_jax.grpo.packing import count_tokens, image_rows_of, pack_rollouts
from safegrpo_jax.metrics import MetricsWriter
from safegrpo_jax.models import hf_config, hf_weights, lora, qwen_vl
from safegrpo_jax.models.decoder import TextConfig
from safegrpo_jax.models.qwen_vl import QwenVLConfig
from safegrpo_jax.models.vision import VisionConfig
from safegrpo_jax.programs import Programs, build_programs
from safegrpo_jax.rewards.automaton import build_tables, token_bytes
from safegrpo_jax.rewards.compose import gold_answer_numbers
from safegrpo_jax.sharding import make_mesh, process_share, shard_batch
from safegrpo_jax.types import Demonstrations, Packing, Params, Prompts, Rollouts

STAGES = ("pretrain", "cold_start", "grpo")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: config, model, data, programs and the work directory.

    `records` by split name; `token_bytes` of every id, as the reward tables were built from; `started` is the
    `time.monotonic()` at which building began.
    """

    config: Config
    workdir: Path
    model_folder: Path
    model: QwenVLConfig
    processor: Processor
    token_bytes: list[bytes]
    records: dict[str, list[Record]]
    programs: Programs
    store: Checkpoints
    started: float

    @property
    def mesh(self) -> Mesh:
        return self.programs.mesh

    def prompts(self, records: Sequence[Record], num_blocks: int) -> Prompts:
        """Sharded prompts of `records`, of which this process encodes its share; blocks as in `Processor`."""
        share = process_share(self.mesh)
        prompts = self.processor.encode_prompts(records, num_blocks, share)
        records = records[share_of(len(records), share)]
        if self.config.rewards.anchor_answers:
            answers = ["" if record.tagged else record.answer for record in records]
            labels = dataclasses.replace(prompts.labels, gold_answer=gold_answer_numbers(answers, self.config.rewards))
            prompts = dataclasses.replace(prompts, labels=labels)
        return shard_batch(prompts, self.mesh)

    def demonstrations(self, records: Sequence[Record], num_blocks: int) -> Demonstrations:
        """Sharded demonstrations of `records`."""
        demonstrations = self.processor.encode_demonstrations(records, num_blocks, process_share(self.mesh))
        return shard_batch(demonstrations, self.mesh)

    def pack(self, prompts: Prompts, rollouts: Rollouts) -> tuple[Packing | None, dict[str, float]]:
        """The packing of the rollouts, None for padded rows, and the tokens that the policy reads: how many are real,
        and their share of all."""
        config = self.config
        prompt_mask, completion_len = processes.fetch((prompts.prompt_mask, rollouts.completion_len))
        prompt_len = prompt_mask.sum(1)
        if not config.packing.row_len:
            copies = 1 if config.packing.share_prompts else config.sampling.group_size
            real = int(prompt_len.sum()) * copies + int(completion_len.sum())
            return None, _token_metrics(real, prompt_mask.size * copies + rollouts.completion_ids.size)
        num_rows, num_patches = prompts.images.segment_ids.shape
        packing = pack_rollouts(
            prompt_len,
            completion_len,
            prompt_mask.shape[1],
            image_rows_of(*processes.fetch((prompts.vision_mask, prompts.feature_index)), num_patches),
            num_rows,
            config.packing,
            config.policy_update.num_minibatches,
            config.mesh.data_parallel,
        )
        placed = jax.device_put(packing, NamedSharding(self.mesh, PartitionSpec()))
        return placed, _token_metrics(*count_tokens(packing))

    def initial_params(self) -> Params:
        """Parameters before any stage: the checkpoint's, or random ones for the embedded model."""
        # The "rbg" generator compiles in a third of the time that the default takes for so many arrays.
        key = jax.random.key(self.config.seed, impl="rbg")
        shardings = self.programs.param_shardings
        if self.config.model.path:
            base = hf_weights.load(self.model_folder, self.model, shardings=lora.without_adapters(shardings))
            if not self.model.lora.rank:
                return base
            make = jax.jit(qwen_vl.init_adapters, static_argnums=0, out_shardings=lora.only_adapters(shardings))
            return lora.join(base, make(self.model, key))
        return self.programs.init_params(key)

    def export(self, params: Params) -> Path:
        """Writes `export/`: weights, adapters merged, config.json, tokenizer files, all as transformers reads them."""
        folder = self.workdir / "export"
        merged = processes.fetch(lora.merge_adapters(params, self.model.lora))
        if processes.is_first():
            shutil.rmtree(folder, ignore_errors=True)
            content = json.loads((self.model_folder / "config.json").read_text())
            hf_weights.export(folder, merged, self.model, content)
            for name in _TOKENIZER_FILES:
                if (self.model_folder / name).is_file():
                    shutil.copyfile(self.model_folder / name, folder / name)
        processes.barrier("export")
        return folder


def _token_metrics(real: int, processed: int) -> dict[str, float]:
    return {"update/real_tokens": float(real), "update/token_efficiency": real / processed}


def needed_splits(config: Config) -> tuple[str, ...]:
    """The splits that a training run reads, each once."""
    splits = [stage for stage in ("pretrain", "cold_start") if getattr(config, stage).num_steps]
    splits += ["train"] if config.train.num_steps else []
    splits += [config.train.replay_split] if config.train.replay_batch else []
    splits += [config.evaluation.validation_split] if config.evaluation.validate_every else []
    return tuple(dict.fromkeys([*splits, *config.evaluation.splits]))


def build_run(config: Config, workdir: Path, splits: Sequence[str]) -> Run:
    """Builds the run of a config in a work directory, new or half done.

    Raises:
      ValueError: anything wrong with the model folder, the data, the config or the checkpoints of `workdir`.
    """
    if config.model.size and not config.model.path:
        raise ValueError(
            f"config.model.path is empty: {config.model.size!r} needs its checkpoint, a folder in Hugging Face format; "
            "without one --mode=plan tells whether it would fit"
        )
    started = time.monotonic()
    _use_compilation_cache(config)
    mesh = make_mesh(config.mesh.axis_sizes)
    processes.check_shared(workdir)
    with processes.first_alone("base model"):
        folder = Path(config.model.path) if config.model.path else _base_model(config, workdir / "base_model")
    model = config_lib.executed(hf_config.read_config(folder), config.model)
    config_lib.check_size(model, config.model)
    processor = Processor.from_folder(
        folder, dataclasses.replace(config.processor, max_image_pixels=config.data.max_image_pixels)
    )
    pieces = token_bytes(processor.chat.tokenizer, model.text.vocab_size)
    tables, other_tables = (
        build_tables(config.rewards.rules(rule_set), pieces, config_lib.cache_folder(config) / "reward_tables")
        for rule_set in (config.rewards.rule_set, config.rewards.other_rule_set)
    )
    with processes.first_alone("data"):
        records = _load_records(config, processor, splits, workdir)
    data_fingerprint = fingerprint(records)
    processes.agree("data", {"data fingerprint": data_fingerprint})
    banned = banned_ids(processor, model)
    programs = build_programs(config, model, mesh, banned, processor.chat.stop_ids, tables, other_tables)
    store = Checkpoints(
        workdir,
        config.checkpoint,
        stages=STAGES,
        run_config=json.loads(config_lib.to_json(config)),
        data_fingerprint=data_fingerprint,
    )
    return Run(config, workdir, folder, model, processor, pieces, records, programs, store, started)


def banned_ids(processor: Processor, model: QwenVLConfig) -> np.ndarray:
    """True for ids that are never sampled and get no probability: vision tokens and rows without a token.

    A policy that samples an image token breaks every later count of them; rows past the tokenizer were never trained.
    """
    tokenizer = processor.chat.tokenizer
    banned = np.arange(model.text.vocab_size) >= len(tokenizer)
    banned[[model.image_token_id, model.video_token_id, model.vision_start_token_id, model.vision_end_token_id]] = True
    vision_pad = tokenizer.convert_tokens_to_ids("<|vision_pad|>")
    if vision_pad is not None:
        banned[vision_pad] = True
    return banned


def fingerprint(records: dict[str, list[Record]]) -> str:
    """Hash of the training records: a resumed run must see the same data."""
    digest = hashlib.sha256()
    for split in sorted(records):
        for record in records[split]:
            digest.update(repr((split, dataclasses.replace(record, images=()))).encode())
            digest.update(b"".join(hashlib.sha256(image).digest() for image in record.images))
    return digest.hexdigest()


def _load_records(
    config: Config, processor: Processor, splits: Sequence[str], workdir: Path
) -> dict[str, list[Record]]:
    records, bad_rows = load_splits(config.data, splits, config.seed, workdir)
    for split in splits:
        records[split], too_long = processor.drop_too_long(records[split])
        if too_long and config.data.on_bad_row == "raise":
            raise ValueError(f'{too_long[0]} (or set data.on_bad_row="skip")')
        bad_rows += too_long
        if not records[split]:
            raise ValueError(f"{config.data.path}: no record of split {split!r} fits the buckets; first: {too_long[0]}")
    _check_anchors(records.get("train", []), config)
    if bad_rows and processes.is_first():
        workdir.mkdir(parents=True, exist_ok=True)
        write_bad_rows(workdir / "bad_rows.jsonl", bad_rows)
        logging.warning("%d bad rows skipped, listed in %s", len(bad_rows), workdir / "bad_rows.jsonl")
    return records


def _check_anchors(records: Sequence[Record], config: Config) -> None:
    """A plain question to train on whose gold answer the reward cannot name would be 0 whatever the policy says."""
    answers = config.rewards.anchor_answers
    for record in records if answers else ():
        if not record.tagged and not gold_answer_numbers([record.answer], config.rewards)[0]:
            raise ValueError(
                f"record {record.record_id} of split 'train': answer {record.answer!r} is not among "
                f"rewards.anchor_answers {answers}; add it there or remove the record"
            )


def open_metrics(run: Run) -> MetricsWriter:
    """Metrics of the work directory, rewound to its newest checkpoint: call it to train, not to look.

    Raises:
      ValueError: that checkpoint was written by another config or other data; names what differs.
    """
    latest = run.store.latest()
    if latest:
        run.store.check_run(latest)
    writer = MetricsWriter(run.workdir, tensorboard=run.config.tensorboard)
    writer.rewind(STAGES, latest.stage if latest else STAGES[0], latest.step if latest else 0)
    return writer


def _base_model(config: Config, folder: Path) -> Path:
    """Writes the embedded model's folder, without weights: tokenizer and config.json."""
    if (folder / "config.json").is_file():
        return folder
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    small, processor = config.model.small, config.processor
    demo_tokenizer.build_tokenizer(partial, [processor.instruction])
    tokenizer = ChatTokenizer.from_folder(partial).tokenizer

    def token_id(token: str) -> int:
        return tokenizer.convert_tokens_to_ids(token)

    half = small.text_head_dim // 2
    model = qwen_vl.QwenVLConfig(
        vision=VisionConfig(
            width=small.vision_width,
            mlp_width=small.vision_mlp_width,
            num_layers=small.vision_layers,
            num_heads=small.vision_heads,
            out_width=small.text_width,
            deepstack_layers=small.deepstack_layers,
            patch_size=processor.patch_size,
            num_positions=processor.position_table_side**2,
        ),
        text=TextConfig(
            vocab_size=len(tokenizer),
            width=small.text_width,
            mlp_width=small.text_mlp_width,
            num_layers=small.text_layers,
            num_heads=small.text_heads,
            num_kv_heads=small.text_kv_heads,
            rope_theta=10_000.0,
            mrope_section=(half - 2 * (half * 5 // 16), half * 5 // 16, half * 5 // 16),  # 24, 20, 20 of 64, scaled
            head_dim=small.text_head_dim,
            tied_embeddings=True,
        ),
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )
    (partial / "config.json").write_text(json.dumps(hf_config.config_to_hf(model), indent=2) + "\n")
    partial.rename(folder)
    return folder


def _use_compilation_cache(config: Config) -> None:
    """Compiled programs are kept between runs; small ones too, since the demo has many."""
    folder = config_lib.cache_folder(config) / "programs"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
