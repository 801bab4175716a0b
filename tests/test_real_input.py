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
from safegrpo_jax import run as run_lib
from safegrpo_jax import train
from safegrpo_jax.data import demo_tokenizer
from safegrpo_jax.data.chat import ChatTokenizer
from safegrpo_jax.models import hf_weights, qwen_vl

torch = pytest.importorskip("torch")
datasets = pytest.importorskip("sklearn.datasets")
transformers = pytest.importorskip("transformers")

LOGITS_TOLERANCE = 1e-4  # float32 on both sides, sums in another order


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


def real_config(model, data, cache_folder, lora_rank=0):
    values = cpu_demo.get_config("smoke")
    values.cache_folder = str(cache_folder)
    values.mesh.data = values.mesh.cpu_devices = 8
    values.model.path, values.data.path = str(model), str(data)
    values.model.freeze_vision = False
    values.model.lora.rank = lora_rank
    values.processor.patch_size, values.processor.position_table_side = 16, 8
    values.processor.min_pixels, values.processor.max_pixels = 32 * 32, 128 * 128
    values.processor.prompt_buckets, values.processor.patch_buckets = (64,), (64,)
    values.pretrain.num_steps = values.cold_start.num_steps = 0
    values.train.replay_batch, values.loss.replay_weight = 0, 0.0
    values.train.num_steps, values.train.prompts_per_step = 2, 8
    values.policy_update.num_minibatches = 1
    values.sampling.group_size, values.sampling.max_new_tokens = 2, 8
    values.evaluation.splits, values.evaluation.validate_every = ("test",), 0
    values.evaluation.batch_size = values.evaluation.sampled_records = 8
    values.checkpoint.save_every = 1
    return config_lib.from_config_dict(values)


def build(config, workdir):
    return run_lib.build_run(config, workdir, run_lib.needed_splits(config))


@pytest.mark.parametrize("tied", [True, False])
def test_real_input_trains_resumes_and_exports(tied, tmp_path):
    config = real_config(
        write_model(tmp_path / "model", tied), write_photographs(tmp_path / "data"), tmp_path / "cache"
    )
    first = build(config, tmp_path / "run")
    with jax.set_mesh(first.mesh):
        assert train.train(first, run_lib.open_metrics(first)) == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]

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


def test_adapters_of_a_real_checkpoint(tmp_path):
    """They start at the checkpoint, are all that the optimizer holds, and leave no trace in the export."""
    model = write_model(tmp_path / "model", tied=False)
    config = real_config(model, write_photographs(tmp_path / "data"), tmp_path / "cache", lora_rank=2)
    run = build(config, tmp_path / "run")
    with jax.set_mesh(run.mesh):
        params = run.initial_params()
        folder = run.export(params)
    assert jax.tree.structure(params) == jax.tree.structure(run.programs.abstract_params)
    num_adapters = 4 * 2 * 2  # q, k, v, o; A and B; tapped and other layers
    opt_state = jax.eval_shape(run.programs.init_state["grpo"], params).opt_state
    assert sum(leaf.ndim > 0 for leaf in jax.tree.leaves(opt_state)) == 2 * num_adapters
    original, exported = (load_file(where / "model.safetensors") for where in (model, folder))
    assert original.keys() == exported.keys()
    for name, weight in original.items():
        np.testing.assert_array_equal(exported[name], weight)


def check_export(run, folder):
    """transformers reads the export and computes the logits that we compute from the checkpoint."""
    records = run.records["test"][:1]
    prompts = run.processor.encode_prompts(records)
    real = prompts.prompt_mask[0]
    ids = prompts.prompt_ids[0][real]
    params = hf_weights.load(folder, run.model)
    config = dataclasses.replace(run.model, dtype="float32")
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
