"""Order of records: complete epochs, exact resume, the same batch however many processes share it."""

import itertools

import numpy as np
import pytest

from safegrpo_jax.data.pipeline import batches


def take(num_batches, *arguments, **keywords):
    return list(itertools.islice(batches(*arguments, **keywords), num_batches))


def test_every_record_once_per_epoch_and_none_lost_at_borders():
    order = np.concatenate([indices for _, indices in take(15, 10, 4, seed=3)])  # 6 epochs, borders inside batches
    for epoch in order.reshape(6, 10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert len({tuple(epoch) for epoch in order.reshape(6, 10)}) > 1


def test_resume_is_exact():
    whole = take(12, 23, 5, seed=1)
    for start in (1, 4, 7, 11):
        for (step, indices), (resumed_step, resumed) in zip(
            whole[start:], take(12 - start, 23, 5, seed=1, start_step=start), strict=True
        ):
            assert step == resumed_step
            np.testing.assert_array_equal(indices, resumed)


def test_processes_share_the_batch_of_one():
    alone = take(5, 17, 6, seed=2)
    shares = [take(5, 17, 6, seed=2, process_index=index, process_count=3) for index in range(3)]
    for step in range(5):
        np.testing.assert_array_equal(alone[step][1], np.concatenate([share[step][1] for share in shares]))


def test_seeds_differ():
    assert not np.array_equal(take(1, 100, 50, seed=0)[0][1], take(1, 100, 50, seed=1)[0][1])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"num_records": 3}, "batch size 4 must be in 1..3"),
        ({"num_records": 0}, "batch size 4 must be in 1..0"),
        ({"process_count": 3}, "cannot be shared by process 0 of 3"),
        ({"process_count": 2, "process_index": 2}, "cannot be shared by process 2 of 2"),
        ({"start_step": -1}, "start step -1"),
    ],
)
def test_refusals_come_at_the_call(keywords, message):
    with pytest.raises(ValueError, match=message):
        batches(**{"num_records": 10, "batch_size": 4, "seed": 0, **keywords})
