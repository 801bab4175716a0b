"""The published SafeGRPO run on TPU v5p, 95 GB a chip; arguments `:4b`, `:8b`, `:2_5_7b`, `:30b_a3b`.

8 chips (v5p-16) for all models but the mixture, which is for 32 (v5p-64).

    python -m safegrpo_jax.main --config=configs/tpu_v5p.py:8b --config.model.path=FOLDER --config.data.path=FOLDER
    python -m safegrpo_jax.main --config=configs/tpu_v5p.py:8b --mode=plan --topology=v5p:2x2x2
"""

from ml_collections import ConfigDict

from configs import tpu_shared
from configs.tpu_shared import Slice

SLICES = {
    "4b": Slice("v5p:2x2x2", fsdp=8, tensor=1, slots=512),
    "8b": Slice("v5p:2x2x2", fsdp=8, tensor=1, slots=512),
    "2_5_7b": Slice("v5p:2x2x2", fsdp=8, tensor=1, slots=512),
    "30b_a3b": Slice("v5p:2x4x4", fsdp=16, tensor=2, slots=512),
}


def get_config(arg: str = "8b") -> ConfigDict:
    return tpu_shared.get_config(arg, "tpu_v5p", SLICES)
