"""A model folder that transformers wrote and photographs in a parquet file: train, resume, export, equal logits."""

import dataclasses
import io
import json

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import load_file

from configs import cpu_demo
from safegrpo_jax import config as config_lib
from safegrpo_jax import programs, train
from safegrpo_jax import run as run_lib
from safegrpo_jax.data import demo_tokenizer
from safegrpo_jax.data.chat import ChatTokenizer
from safegrpo_jax.models import hf_weights, lora, qwen_vl

torch = pytest.importorskip("torch")
datasets = pytest.importorskip("sklearn.datasets")
transformers = pytest.importorskip("transformers")

LOGITS_TOLERANCE = 1e-4  # float32 on both sides, sums in another order
SAME_PASS = 1e-5  # the same log-probabilities by two compiled programs, in float32


def write_model(folder, tied):
    """A random Qwen3-VL of a size of its own, saved by transformers, with a tokenizer."""
    demo_tokenizer.build_tokenizer(folder, ["Think in five steps."])
    tokenizer = ChatTokenizer.from_folder(folder).tokenizer
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in {
        "image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end",
    }.items()}  # fmt: skip
    config = transformers.Qwen3VLConfig(
        tie_word_embeddings=tied,
        vision_config={
            "hidden_size": 48, "intermediate_size": 64, "depth": 4, "num_heads": 4, "out_hidden_size": 64,
            "deepstack_visual_indexes": [0, 1, 2], "patch_size": 16, "num_position_embeddings": 64,
        },
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": tied,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True, "mrope_section": [6, 5, 5],
            },
        },
        **ids,
    )  # fmt: skip
    torch.manual_seed(int(tied))
    transformers.Qwen3VLForConditionalGeneration(config).float().save_pretrained(folder)
    return folder


def write_photographs(folder):
    """Crops and scales of two photographs, in a parquet as SafeTag-VL-3K has it."""
    photographs = [Image.fromarray(image) for image in datasets.load_sample_images().images]
    rows = {name: [] for name in ("prompt", "images", "text_tag", "image_tag", "combine_tag")}
    for index in range(8):
        size = (96 + 32 * (index % 3), 64 + 48 * (index % 2))
        buffer = io.BytesIO()
        photographs[index % 2].resize(size).save(buffer, "PNG" if index % 2 else "JPEG")
        rows["prompt"].append("What is this?" if index % 2 else "Can I touch this?")
        rows["images"].append([{"bytes": buffer.getvalue(), "path": None}])
        for name, unsafe in (("text_tag", index % 2), ("image_tag", index % 4 > 1), ("combine_tag", index % 3 == 0)):
            rows[name].append("unsafe" if unsafe else "safe")
    folder.mkdir()
    for split in ("train", "test"):
        pq.write_table(pa.table(rows), folder / f"{split}.parquet")
    return folder


def real_config(model, data, cache_folder, adapters=False):
    values = cpu_demo.get_config("smoke")
    values.cache_folder = str(cache_folder)
    values.mesh.data = values.mesh.cpu_devices = 8
    values.model.path, values.data.path = str(model), str(data)
    values.model.freeze_vision = False
    values.model.lora.rank = 2 if adapters else 0
    values.model.lora.vision_projections = ("qkv",)
    values.processor.patch_size, values.processor.position_table_side = 16, 8
    values.processor.min_pixels, values.processor.max_pixels = 32 * 32, 128 * 128
    values.processor.prompt_buckets, values.processor.patch_buckets = (64,), (64,)
    values.pretrain.num_steps = values.cold_start.num_steps = 0
    values.train.replay_batch, values.loss.replay_weight = 0, 0.0
    values.optimizer.learning_rate = 3e-3
    values.loss.entropy_coefficient = 0.1  # every reward of a random model is 0, and so would be the gradient
    values.train.num_steps, values.train.prompts_per_step = 2, 8
    values.policy_update.num_minibatches = 1
    values.sampling.group_size, values.sampling.max_new_tokens = 2, 8
    values.evaluation.splits, values.evaluation.validate_every = ("test",), 0
    values.evaluation.batch_size = values.evaluation.sampled_records = 8
    values.checkpoint.save_every = 1
    return config_lib.from_config_dict(values)


def build(config, workdir):
    return run_lib.build_run(config, workdir, run_lib.needed_splits(config))


@pytest.mark.parametrize(
    ("tied", "adapters"), [(True, False), (False, False), (False, True)], ids=["tied", "untied", "adapters"]
)
def test_real_input_trains_resumes_and_exports(tied, adapters, tmp_path):
    model = write_model(tmp_path / "model", tied)
    config = real_config(model, write_photographs(tmp_path / "data"), tmp_path / "cache", adapters)
    first = build(config, tmp_path / "run")
    with jax.set_mesh(first.mesh):
        assert train.train(first, run_lib.open_metrics(first)) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert abs(rows[0]["policy/kl"]) < SAME_PASS < rows[1]["policy/kl"]  # the reference stays where GRPO began

    # As if the run had died after step 1: it goes on from that checkpoint to the same end.
    finished = (tmp_path / "run" / "metrics.jsonl").read_text()
    exported = (tmp_path / "run" / "export" / "model.safetensors").read_bytes()
    for gone in ("checkpoints/grpo/2", "checkpoints/grpo/finished.json", "evaluation/after.json"):
        path = tmp_path / "run" / gone
        path.rename(tmp_path / gone.replace("/", "_"))
    second = build(config, tmp_path / "run")
    with jax.set_mesh(second.mesh):
        assert train.train(second, run_lib.open_metrics(second)) == 0
    without_times = [
        [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in text.splitlines()]
        for text in (finished, (tmp_path / "run" / "metrics.jsonl").read_text())
    ]
    assert without_times[0] == without_times[1]
    assert (tmp_path / "run" / "export" / "model.safetensors").read_bytes() == exported

    check_export(second, tmp_path / "run" / "export")
    if adapters:
        with jax.set_mesh(second.mesh):
            check_adapters(second, model)


def check_adapters(run, model_folder):
    """Only adapters moved, the export is their merge, and the reference is the checkpoint without them."""
    start, trained = run.initial_params(), train.latest_params(run)
    moved = jax.tree.map(lambda before, after: bool((before != after).any()), start, trained)
    assert moved == lora.adapter_mask(start)  # text and vision, A and B

    adapted = {f"self_attn.{name}_proj" for name in "qkvo"} | {"attn.qkv"}
    original, exported = (load_file(folder / "model.safetensors") for folder in (model_folder, run.workdir / "export"))
    assert original.keys() == exported.keys()
    changed = {name for name in original if (original[name] != exported[name]).any()}
    assert changed == {name for name in original if any(f".{part}.weight" in name for part in adapted)}

    reference = run.programs.freeze(start)
    num_adapters = len(jax.tree.leaves(lora.only_adapters(start)))
    assert len(jax.tree.leaves(reference)) == num_adapters > 0
    opt_state = jax.eval_shape(run.programs.init_state["grpo"], start).opt_state
    assert sum(leaf.ndim > 0 for leaf in jax.tree.leaves(opt_state)) == 2 * num_adapters

    prompts = run.prompts(run.records["train"][:8], 8)
    rollouts, _ = run.programs.sampler.generate(run.programs.sampler_params(trained), prompts, jax.random.key(0))
    experience, _, _ = run.programs.score(trained, reference, prompts, rollouts)
    base = dataclasses.replace(run.model, lora=lora.LoraConfig())
    logps_fn = programs.make_logps_fn(base, run_lib.banned_ids(run.processor, base), 1.0, 0, freeze_vision=True)
    tokens = (prompts, rollouts.completion_ids, rollouts.completion_mask)
    expected, _ = jax.jit(logps_fn)(hf_weights.load(model_folder, base), *tokens)
    np.testing.assert_allclose(experience.reference_logps, expected, atol=SAME_PASS)
    assert np.abs(experience.behavior_logps - expected).max() > 10 * SAME_PASS


def check_export(run, folder):
    """transformers reads the export and computes the logits that we compute from the checkpoint."""
    records = run.records["test"][:1]
    prompts = run.processor.encode_prompts(records)
    real = prompts.prompt_mask[0]
    ids = prompts.prompt_ids[0][real]
    params = hf_weights.load(folder, run.model)
    config = dataclasses.replace(run.model, dtype="float32", lora=lora.LoraConfig())
    features = qwen_vl.encode_images(params, prompts.images, config)
    hidden = qwen_vl.text_hidden(
        params, prompts.prompt_ids, prompts.prompt_mask, prompts.positions, prompts.vision_mask, prompts.feature_index,
        features, config,
    )  # fmt: skip
    ours = np.asarray(qwen_vl.logits_from_hidden(params, hidden, config))[0][real]

    model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").float()
    patches = prompts.images.segment_ids[0] == 1
    height, width = prompts.images.patch_pos[0][patches].max(0) + 1
    with torch.no_grad():
        theirs = (
            model(
                input_ids=torch.tensor(ids[None].astype(np.int64)),
                attention_mask=torch.ones((1, len(ids)), dtype=torch.long),
                pixel_values=torch.tensor(np.asarray(prompts.images.patches[0][patches], np.float32)),
                image_grid_thw=torch.tensor([[1, int(height), int(width)]]),
                mm_token_type_ids=torch.tensor((ids == run.model.image_token_id)[None].astype(np.int64)),
            )
            .logits[0]
            .numpy()
        )
    assert np.abs(ours - theirs).max() <= LOGITS_TOLERANCE
    assert transformers.AutoTokenizer.from_pretrained(folder).decode(ids) == run.processor.decode(
        ids.tolist(), keep_special=True
    )
