"""The published SafeGRPO run on TPU v4, 32 GB a chip; arguments `:4b`, `:8b`, `:2_5_7b`, `:30b_a3b`.

16 chips (v4-32) for all models but the mixture: its 31 billion parameters with their moments are 373 GB of the 512 GB
that 16 chips have, so it is for 64 chips (v4-128).

    python -m safegrpo_jax.main --config=configs/tpu_v4.py:8b --config.model.path=FOLDER --config.data.path=FOLDER
    python -m safegrpo_jax.main --config=configs/tpu_v4.py:8b --mode=plan --topology=v4:2x2x4
"""

from ml_collections import ConfigDict

from configs import tpu_shared
from configs.tpu_shared import Slice

SLICES = {
    "4b": Slice("v4:2x2x4", fsdp=4, tensor=4, slots=256),
    "8b": Slice("v4:2x2x4", fsdp=4, tensor=4, slots=256),
    "2_5_7b": Slice("v4:2x2x4", fsdp=4, tensor=4, slots=256),
    "30b_a3b": Slice("v4:4x4x4", fsdp=16, tensor=4, slots=256),
}


def get_config(arg: str = "8b") -> ConfigDict:
    return tpu_shared.get_config(arg, "tpu_v4", SLICES)
