"""Rollouts as rows: one JSON-ready dict per completion, with every field needed to recompute its reward.

The schema is that of `rollouts/*.jsonl` and `evaluation/*.jsonl` (see `metrics.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from safegrpo_jax.data.processor import Processor
from safegrpo_jax.data.records import Record
from safegrpo_jax.metrics import describe_spans, token_texts
from safegrpo_jax.types import Rewards, Rollouts


def rollout_rows(
    records: Sequence[Record],
    image_files: Sequence[str],
    rollouts: Rollouts,
    rewards: Rewards,
    processor: Processor,
    token_bytes: Sequence[bytes],
    step: int,
    advantages: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """Rows of `rollouts` (host arrays); rollout r belongs to `records[r // g]` with image file `image_files[r // g]`.

    `token_bytes` as of `rewards.automaton.token_bytes`; `advantages` one per rollout, None in evaluation.
    """
    num_rollouts = len(rollouts.completion_len)
    group = num_rollouts // len(records)
    rows = []
    for r in range(num_rollouts):
        record = records[r // group]
        ids = rollouts.completion_ids[r, : rollouts.completion_len[r]].tolist()
        labels = {"visual": record.image_tag, "text": record.text_tag, "combined": record.combine_tag}
        rows.append(
            {
                "step": step,
                "record_id": record.record_id,
                "sample": r % group,
                "split": record.split,
                "category": record.category,
                "prompt": record.prompt,
                "image_file": image_files[r // group],
                "labels": labels if record.tagged else {},
                "answer": record.answer,
                "text": processor.decode(ids),
                "completion_ids": ids,
                "token_texts": token_texts([token_bytes[token] for token in ids]),
                "spans": describe_spans(rollouts.spans, r),
                "rules": {name: float(value[r]) for name, value in rewards.rules.items()},
                "reward": float(rewards.total[r]),
                "advantage": None if advantages is None else float(advantages[r]),
                "refusal": bool(rollouts.spans.refusal[r]),
                "truncated": bool(rollouts.truncated[r]),
            }
        )
    return rows
