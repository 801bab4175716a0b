"""What the configs of the TPU slices have in common: the published SafeGRPO run (configs/base.py) on a published model.

A slice's own config adds what depends on its chips, a `Slice`. Each data-parallel part takes one prompt with its 8
rollouts at a time, 8 x 6144 tokens at most; `tensor` spreads them over that many devices, and more microbatches than
this there are not. Sampling regroups the same devices: as many parts of the heads as there are key heads, so that a
device keeps one, and all others side by side.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import base

SIZES = {
    "4b": "qwen3-vl-4b",
    "8b": "qwen3-vl-8b",
    "30b_a3b": "qwen3-vl-30b-a3b",
    "2_5_7b": "qwen2.5-vl-7b",
}
KEY_HEADS = {"4b": 8, "8b": 8, "30b_a3b": 4, "2_5_7b": 4}


@dataclasses.dataclass(frozen=True)
class Slice:
    """`topology` as --topology names it; devices = `fsdp` x `tensor`; `slots` rollouts are decoded at a time.
    `sampling_tensor` 0: one key head on a device."""

    topology: str
    fsdp: int
    tensor: int
    slots: int
    sampling_tensor: int = 0


def get_config(arg: str, name: str, slices: dict[str, Slice]) -> ConfigDict:
    """The published run of the model that a config's argument names; `name` is the config's, for its error."""
    if arg not in SIZES:
        raise ValueError(f"configs/{name}.py:{arg}: give a model as argument, one of {', '.join(SIZES)}")
    config, chosen = base.get_config(), slices[arg]
    config.model.size = SIZES[arg]
    config.model.attention = "splash"
    config.model.experts = "megablox"  # read by a mixture only
    config.model.logits_chunk = 128  # completion positions; of 8 rollouts, over the whole vocabulary
    config.mesh.platform = "tpu"
    config.mesh.fsdp, config.mesh.tensor = chosen.fsdp, chosen.tensor
    config.mesh.sampling_tensor = chosen.sampling_tensor or KEY_HEADS[arg]
    config.policy_update.num_microbatches = (
        config.train.prompts_per_step // config.policy_update.num_minibatches // chosen.fsdp
    )
    for section in (config.pretrain, config.cold_start, config.evaluation):
        section.batch_size = 64  # divides among all data-parallel parts
    config.sampling.num_slots = chosen.slots
    config.sampling.min_slots = chosen.slots // 4
    config.sampling.cache_buckets = (1024, 2048)
    if arg == "2_5_7b":
        processor = config.processor
        processor.patch_size, processor.position_table_side = 14, 0
        processor.image_mean = (0.48145466, 0.4578275, 0.40821073)
        processor.image_std = (0.26862954, 0.26130258, 0.27577711)
        processor.min_pixels, processor.max_pixels = 50_176, 802_816  # 256 to 4096 patches, as with patches of 16
    return config
