"""Evaluates a policy on one split: greedy completions for accuracies and refusals, sampled ones for the mean reward.

Takes the programs as functions. Batches are padded to one shape with repeated records, whose results are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from safegrpo_jax import processes
from safegrpo_jax.data.records import Record
from safegrpo_jax.types import Rewards, Rollouts

RunBatch = Callable[[Sequence[Record]], tuple[Rollouts, Rewards]]


def run_split(records: Sequence[Record], batch_size: int, run_batch: RunBatch) -> tuple[Rollouts, Rewards]:
    """Completions of `records` and their rewards as host arrays, in order.

    `run_batch` always sees `batch_size` records.
    """
    parts = []
    for start in range(0, len(records), batch_size):
        batch = list(records[start : start + batch_size])
        padding = [batch[i % len(batch)] for i in range(batch_size - len(batch))]
        result = processes.fetch(run_batch(batch + padding))
        group = len(result[0].completion_len) // batch_size
        keep = slice(len(batch) * group)
        parts.append(jax.tree.map(lambda x, keep=keep: x[keep], result))
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
