"""What the configs of the TPU slices have in common: the published SafeGRPO run on one of the published models.

A slice's own config (`tpu_v4.py` and others) is this with a mesh, microbatches and decode slots that fit it.
"""

from ml_collections import ConfigDict

from configs import base

SIZES = {
    "4b": "qwen3-vl-4b",
    "8b": "qwen3-vl-8b",
    "30b_a3b": "qwen3-vl-30b-a3b",
    "2_5_7b": "qwen2.5-vl-7b",
}


def get_config(size: str, name: str) -> ConfigDict:
    """The published run of the model that a config's argument `size` names; `name` is the config's, for its error."""
    if size not in SIZES:
        raise ValueError(f"configs/{name}.py:{size}: give a model as argument, one of {', '.join(SIZES)}")
    config = base.get_config()
    config.mesh.platform = "tpu"
    config.model.size = SIZES[size]
    config.model.attention = "splash"
    config.model.experts = "megablox"  # read by a mixture only
    config.model.logits_chunk = 128  # of 8 rollouts: their logits over the vocabulary are the largest array
    config.sampling.decode_chunk = 64
    config.sampling.cache_buckets = (1024, 2048)
    config.sampling.min_slots = 64
    config.evaluation.batch_size = 64
    if size == "2_5_7b":
        processor = config.processor
        processor.patch_size, processor.position_table_side = 14, 0
        processor.image_mean = (0.48145466, 0.4578275, 0.40821073)
        processor.image_std = (0.26862954, 0.26130258, 0.27577711)
        processor.min_pixels, processor.max_pixels = 50_176, 802_816  # 256 to 4096 patches, as for patches of 16
    return config
