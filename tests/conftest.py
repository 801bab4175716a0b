"""Test set-up: eight fake CPU devices, exact matmuls, and every jaxtyping annotation checked at call time."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
_hook = install_import_hook("safegrpo_jax", "beartype.beartype")
