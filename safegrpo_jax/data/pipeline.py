"""Which records make the batch of a step: shuffled epochs, sharded by process, exact on resume.

Owns the order of records; never sees their content. The one idea: a batch is a pure function of (seed, step), so the
state of the iterator is the step, and resuming means starting there. Epochs are permutations laid end to end and cut
into batches without regard to their borders: no record is dropped, and over every whole number of epochs each record
comes equally often. A batch across a border may hold a record twice, once from each epoch.

Source: google/grain, `MapDataset`.
"""

from __future__ import annotations

from collections.abc import Iterator

import grain.python as grain
import numpy as np
from jaxtyping import Int


def batches(
    num_records: int,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[tuple[int, Int[np.ndarray, "b"]]]:
    """Yields (step, record indices) without end, from `start_step` on.

    `batch_size` counts all processes; each gets its contiguous part of the batch, so the records of a step do not
    depend on the number of processes. Two streams (prompts and replayed questions, say) are two calls with two seeds.

    Raises:
      ValueError: at the call, for sizes that do not fit each other.
    """
    if not 0 < batch_size <= num_records:
        raise ValueError(f"batch size {batch_size} must be in 1..{num_records}, the number of records")
    if batch_size % process_count or not 0 <= process_index < process_count:
        raise ValueError(f"batch size {batch_size} cannot be shared by process {process_index} of {process_count}")
    if start_step < 0:
        raise ValueError(f"start step {start_step} is negative")
    stream = grain.MapDataset.range(num_records).seed(seed).shuffle().repeat(None)
    share = batch_size // process_count
    return _batches(stream, batch_size, start_step, process_index * share, share)


def _batches(
    stream: grain.MapDataset, batch_size: int, start_step: int, offset: int, share: int
) -> Iterator[tuple[int, np.ndarray]]:
    step = start_step
    while True:
        first = step * batch_size + offset
        yield step, np.array([stream[place] for place in range(first, first + share)], np.int32)
        step += 1
