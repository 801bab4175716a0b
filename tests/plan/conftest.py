"""A GRPO step of a tiny Qwen3-VL on eight CPU devices, planned by the code that plans for TPU slices."""

import dataclasses

import jax
import pytest

from configs import base
from safegrpo_jax import config as config_lib
from safegrpo_jax.models.decoder import TextConfig
from safegrpo_jax.models.qwen_vl import QwenVLConfig
from safegrpo_jax.models.vision import VisionConfig
from safegrpo_jax.plan.topology import GIB, Chip, Topology


@pytest.fixture(scope="session")
def tiny():
    """(config, model)"""
    values = base.get_config()
    values.model.size = "qwen3-vl-2b"  # named by the page alone: the model is the one below
    values.model.compute_dtype = "float32"
    values.mesh.data, values.mesh.fsdp, values.mesh.tensor, values.mesh.sampling_tensor = 1, 4, 2, 2
    values.train.prompts_per_step = 16
    values.policy_update.num_minibatches = 2
    values.policy_update.num_microbatches = 2
    values.sampling.group_size, values.sampling.max_new_tokens, values.sampling.num_slots = 2, 16, 16
    values.sampling.decode_chunk = 4
    values.processor.prompt_buckets, values.processor.completion_buckets = (32,), (16,)
    values.processor.patch_buckets = (64,)
    values.processor.min_pixels, values.processor.max_pixels = 16384, 16384
    values.evaluation.batch_size = 16
    config = config_lib.from_config_dict(values)
    model = QwenVLConfig(
        vision=VisionConfig(32, 64, 3, 2, 64, (0, 1), num_positions=64),
        text=TextConfig(512, 64, 128, 3, 4, 2, 1e4, (8, 4, 4), head_dim=32, tied_embeddings=True),
        image_token_id=500,
        video_token_id=501,
        vision_start_token_id=502,
        vision_end_token_id=503,
    )
    return config, config_lib.executed(model, config.model)


@pytest.fixture(scope="session")
def topology():
    """Eight CPU devices that pass for chips of 1 GiB."""
    return Topology("v4:2x2x2", Chip(GIB, 1e12, 1e10, 1e9), jax.devices())


@pytest.fixture(scope="session")
def plan(tiny, topology):
    from safegrpo_jax.plan.run import make_plan

    return make_plan(*tiny, topology)


def smaller(plan, hbm_bytes):
    """The plan as it would be on devices of so much memory."""
    chip = dataclasses.replace(plan.topology.chip, hbm_bytes=hbm_bytes)
    return dataclasses.replace(plan, topology=dataclasses.replace(plan.topology, chip=chip))
