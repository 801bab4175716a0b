"""Supervised stages: pretraining on plain questions and the cold start on step-guided traces.

Both imitate demonstrations with a mean cross-entropy over completion tokens, through the same update machinery as
GRPO (`grpo/update.py`). The published method has no such stage; a model that never saw the five-step format needs one.
"""

from __future__ import annotations

import dataclasses

from safegrpo_jax.grpo.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class SupervisedConfig:
    """One supervised stage; `num_steps` 0 leaves it out.

    `batch_size` demonstrations per step, in `num_microbatches` gradient pieces; metrics every `log_every` steps.
    """

    num_steps: int = 0
    batch_size: int = 32
    num_microbatches: int = 1
    checkpoint_every: int = 200
    log_every: int = 10
    optimizer: OptimizerConfig = OptimizerConfig()
