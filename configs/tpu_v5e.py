"""The published SafeGRPO run on TPU v5e, 16 GB a chip; arguments `:4b`, `:8b`, `:2_5_7b`, `:30b_a3b`.

64 chips (v5litepod-64) for all models but the mixture, which is for 256.

    python -m safegrpo_jax.main --config=configs/tpu_v5e.py:8b --config.model.path=FOLDER --config.data.path=FOLDER
    python -m safegrpo_jax.main --config=configs/tpu_v5e.py:8b --mode=plan --topology=v5e:8x8
"""

from ml_collections import ConfigDict

from configs import tpu_shared
from configs.tpu_shared import Slice

SLICES = {
    "4b": Slice("v5e:8x8", fsdp=16, tensor=4, slots=384),
    "8b": Slice("v5e:8x8", fsdp=16, tensor=4, slots=384),
    "2_5_7b": Slice("v5e:8x8", fsdp=16, tensor=4, slots=384),
    # Its 61 GB in bfloat16 on 4 parts of the heads would leave no room: 16 parts, whose devices repeat the key heads.
    "30b_a3b": Slice("v5e:16x16", fsdp=64, tensor=4, slots=128, sampling_tensor=16),
}


def get_config(arg: str = "8b") -> ConfigDict:
    return tpu_shared.get_config(arg, "tpu_v5e", SLICES)
