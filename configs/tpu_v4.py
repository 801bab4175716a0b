"""v4"""

from ml_collections import ConfigDict

from configs import tpu_shared


def get_config(arg: str = "8b") -> ConfigDict:
    config = tpu_shared.get_config(arg, "tpu_v4")
    config.mesh.fsdp, config.mesh.tensor = 4, 4
    config.policy_update.num_microbatches = 16
    config.sampling.num_slots = 256
    return config
