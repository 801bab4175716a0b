"""A whole GRPO step against TRL's GRPOTrainer without vLLM: same model, prompts, batch, loss terms and two CPU cores.

The Qwen3-VL of 13 million parameters of backbone_speed.py; 4 prompts with an image of 128 x 128 pixels, 8 samples of
128 tokens each, reward, KL against a frozen copy, one optimizer step. The two take turns inside TRL's own training
loop, so that other load on the machine meets both; medians are compared. Both may use both cores: TRL by two threads,
ours by two devices of one thread.

Beside requirements.txt: pip install torch==2.13.0 trl==1.16.0

    JAX_PLATFORMS=cpu python tests/benchmarks/grpo_step_vs_trl.py [rounds]
"""

import dataclasses
import io
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from backbone_speed import CONFIG
from datasets import Dataset
from PIL import Image
from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration, TrainerCallback
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.processing_utils import ProcessorMixin
from trl import GRPOConfig, GRPOTrainer

from configs import cpu_demo
from safegrpo_jax import config as config_lib
from safegrpo_jax import run as run_lib
from safegrpo_jax.data import demo_tokenizer
from safegrpo_jax.models.hf_config import config_to_hf
from safegrpo_jax.step import grpo_step

NUM_CORES = 2
PROMPTS, SAMPLES, TOKENS, SIDE = 4, 8, 128, 128
KL_COEFFICIENT, LEARNING_RATE = 0.01, 1e-6
INSTRUCTION = "Think in five steps."
TEXTS = ("May I touch this?", "Can I eat this?", "Is this hot to hold?", "May I open this?")
LARGEST_RATIO = 0.6


class StillProcessor(Qwen3VLProcessor):
    """transformers' processor without its part for videos, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        for kind in ("image", "video"):
            token = f"<|{kind}_pad|>"
            setattr(self, f"{kind}_token", token)
            setattr(self, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(token))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def make_images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3)).astype(np.uint8)) for _ in range(PROMPTS)]


def write_model(folder: Path) -> None:
    """The model of CONFIG with random weights, the ids of its vision tokens those of the embedded tokenizer."""
    demo_tokenizer.build_tokenizer(folder, [INSTRUCTION, *TEXTS])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in names.items()}
    torch.manual_seed(0)
    hf_config = Qwen3VLConfig(**config_to_hf(dataclasses.replace(CONFIG, **ids)))
    hf_config.text_config.eos_token_id = tokenizer.eos_token_id
    Qwen3VLForConditionalGeneration(hf_config).float().save_pretrained(folder)


def write_data(folder: Path, images: list[Image.Image]) -> None:
    files = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        files.append([{"bytes": buffer.getvalue(), "path": None}])
    tags = {name: ["safe"] * PROMPTS for name in ("text_tag", "image_tag", "combine_tag")}
    folder.mkdir()
    pq.write_table(pa.table({"prompt": list(TEXTS), "images": files, **tags}), folder / "train.parquet")


def make_our_step(model: Path, data: Path, workdir: Path):
    """A function that does one step of the run, and the mean of its timers; nothing of the run is cut short."""
    values = cpu_demo.get_config("smoke")
    values.cache_folder = str(workdir / "cache")
    values.model.path, values.data.path = str(model), str(data)
    values.model.freeze_vision = False
    values.processor.patch_size, values.processor.min_pixels, values.processor.max_pixels = 16, SIDE**2, SIDE**2
    values.processor.prompt_buckets, values.processor.completion_buckets = (48,), (TOKENS,)
    values.processor.instruction = INSTRUCTION
    values.pretrain.num_steps = values.cold_start.num_steps = 0
    values.train.replay_batch, values.loss.replay_weight = 0, 0.0
    values.train.num_steps, values.train.dump_rollouts_every = 1_000_000, 1_000_000
    values.train.prompts_per_step, values.sampling.group_size, values.sampling.max_new_tokens = PROMPTS, SAMPLES, TOKENS
    values.policy_update.num_minibatches = 1
    values.loss.ratio_anchor, values.loss.kl_coefficient = "policy", KL_COEFFICIENT
    values.optimizer.learning_rate, values.optimizer.schedule = LEARNING_RATE, "constant"
    values.optimizer.warmup_steps = values.optimizer.total_steps = 0
    values.evaluation.splits, values.evaluation.validate_every = (), 0
    run = run_lib.build_run(config_lib.from_config_dict(values), workdir / "run", ("train",))
    with jax.set_mesh(run.mesh):
        params = run.initial_params()
        reference, state = run.programs.freeze(params), run.programs.init_state["grpo"](params)
    parts, records = [], run.records["train"]

    def step():
        nonlocal state
        with jax.set_mesh(run.mesh):
            key = jax.random.fold_in(jax.random.key(0), len(parts))
            state, metrics = grpo_step(run, state, reference, records, None, key, 1)
        parts.append({name: value for name, value in metrics.items() if name.endswith("_seconds")})
        return metrics

    return step, parts


class TakeTurns(TrainerCallback):
    """Does one of our steps before each of TRL's and measures both."""

    def __init__(self, our_step):
        self.our_step, self.seconds = our_step, {"ours": [], "trl": []}

    def on_step_begin(self, *_, **__):
        started = time.perf_counter()
        self.our_step()
        self.started = time.perf_counter()
        self.seconds["ours"].append(self.started - started)

    def on_step_end(self, *_, **__):
        self.seconds["trl"].append(time.perf_counter() - self.started)


def make_trainer(model: Path, images: list[Image.Image], folder: Path, steps: int, callback: TakeTurns) -> GRPOTrainer:
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    size = {"shortest_edge": SIDE**2, "longest_edge": SIDE**2}
    processor = StillProcessor(Qwen2VLImageProcessorPil(patch_size=16, size=size), tokenizer, tokenizer.chat_template)
    prompts = [[{"role": "user", "content": f"{text}\n{INSTRUCTION}"}] for text in TEXTS]
    rng = np.random.default_rng(0)
    arguments = GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=PROMPTS * SAMPLES,
        num_generations=SAMPLES,
        max_completion_length=TOKENS,
        beta=KL_COEFFICIENT,
        learning_rate=LEARNING_RATE,
        max_steps=steps,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    return GRPOTrainer(
        model=str(model),
        reward_funcs=lambda completions, **_: rng.random(len(completions)).tolist(),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": prompts, "image": images}),
        processing_class=processor,
        callbacks=[callback],
    )


def main(rounds: int = 7) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_CORES])
    torch.set_num_threads(NUM_CORES)
    jax.config.update("jax_num_cpu_devices", NUM_CORES)
    with tempfile.TemporaryDirectory() as name:
        folder, images = Path(name), make_images()
        write_model(folder / "model")
        write_data(folder / "data", images)
        our_step, parts = make_our_step(folder / "model", folder / "data", folder)
        turns = TakeTurns(our_step)
        make_trainer(folder / "model", images, folder / "trl", rounds + 1, turns).train()
    seconds = {name: values[1:] for name, values in turns.seconds.items()}  # the first compiles
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = medians["ours"] / medians["trl"]
    part_medians = {name: statistics.median(part[name] for part in parts[1:]) for name in parts[0]}
    print(", ".join(f"{name} {value:.2f}" for name, value in sorted(part_medians.items())))
    print(f"medians of {rounds}: ours {medians['ours']:.2f} s, TRL {medians['trl']:.2f} s, ratio {ratio:.2f}")
    print(f"fastest: ours {min(seconds['ours']):.2f} s, TRL {min(seconds['trl']):.2f} s")
    sys.exit(ratio > LARGEST_RATIO)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
