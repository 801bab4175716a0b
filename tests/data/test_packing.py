"""Positions of the published worked case, against transformers, and places of packed images."""

import numpy as np
import pytest

from safegrpo_jax.data.packing import expand_images, pack_images, smallest_bucket

IMAGE = 99


def test_worked_case():
    prompt = expand_images([1, 2, 3, IMAGE, 4, 5, 6, 7], IMAGE, [(4, 6)])
    assert prompt.token_ids.tolist() == [1, 2, 3, *[IMAGE] * 6, 4, 5, 6, 7]
    assert prompt.positions.tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7, 8, 9],
        [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7, 8, 9],
        [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9],
    ]
    assert prompt.rope_delta == -3
    assert prompt.vision_mask.tolist() == [False] * 3 + [True] * 6 + [False] * 4


def test_text_only_counts_up():
    prompt = expand_images([5, 6, 7], IMAGE, [])
    assert prompt.positions.tolist() == [[0, 1, 2]] * 3
    assert prompt.rope_delta == 0 and not prompt.vision_mask.any()


def test_prompt_may_begin_and_end_with_images():
    prompt = expand_images([IMAGE, 1, IMAGE], IMAGE, [(2, 2), (2, 4)])
    assert prompt.positions.tolist() == [[0, 1, 2, 2], [0, 1, 2, 2], [0, 1, 2, 3]]
    assert prompt.rope_delta == 0  # the next token sits at 2 + max(1, 2) = 4, the number of tokens


def test_wrong_number_of_images():
    with pytest.raises(ValueError, match="1 image tokens in the prompt for 2 images"):
        expand_images([1, IMAGE], IMAGE, [(2, 2), (2, 2)])


@pytest.mark.parametrize("grids", [[(4, 6)], [(2, 8), (10, 4)], [(6, 6), (2, 2), (4, 12)]])
def test_positions_equal_transformers(grids):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.qwen3_vl.modeling_qwen3_vl")
    config = modeling.Qwen3VLConfig(image_token_id=IMAGE, video_token_id=98)
    given = [1, 2] + [token for _ in grids for token in (IMAGE, 3)] + [4, 5]
    prompt = expand_images(given, IMAGE, grids)
    with torch.device("meta"):
        model = modeling.Qwen3VLModel._from_config(config)
    positions, delta = model.get_rope_index(
        torch.tensor(prompt.token_ids[None].astype(np.int64)),
        mm_token_type_ids=torch.tensor(prompt.vision_mask[None].astype(np.int64)),
        image_grid_thw=torch.tensor([[1, *grid] for grid in grids]),
    )
    np.testing.assert_array_equal(prompt.positions, positions[:, 0].numpy())
    assert prompt.rope_delta == int(delta)


def test_images_are_packed_first_fit():
    places, rows = pack_images([[4, 8], [8], [4], []], num_blocks=1, row_size=12)
    assert places == [[(0, 0), (0, 4)], [(1, 0)], [(1, 8)], []]
    assert rows == 2


def test_blocks_have_rows_of_their_own():
    places, rows = pack_images([[8], [8], [8], [8], [4], []], num_blocks=3, row_size=12)
    assert rows == 2
    assert places == [[(0, 0)], [(1, 0)], [(2, 0)], [(3, 0)], [(4, 0)], []]


@pytest.mark.parametrize(
    ("needed", "rows"), [(0, 1), (1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 8), (12, 12), (13, 16)]
)
def test_rows_follow_the_ladder(needed, rows):
    assert pack_images([[4]] * needed + [[]], num_blocks=1, row_size=4)[1] == rows


def test_no_overlap_whatever_the_sizes():
    rng = np.random.default_rng(0)
    for _ in range(50):
        counts = [(4 * rng.integers(1, 9, rng.integers(0, 4))).tolist() for _ in range(12)]
        places, rows = pack_images(counts, num_blocks=4, row_size=32)
        used = np.zeros((4 * rows, 32), int)
        for prompt, (prompt_counts, prompt_places) in enumerate(zip(counts, places, strict=True)):
            for count, (row, offset) in zip(prompt_counts, prompt_places, strict=True):
                assert row // rows == prompt // 3
                assert offset + count <= 32
                used[row, offset : offset + count] += 1
        assert used.max() <= 1 and used.sum() == sum(map(sum, counts))


def test_refusals():
    with pytest.raises(ValueError, match="36 patches does not fit a row of 32"):
        pack_images([[36]], 1, 32)
    with pytest.raises(ValueError, match="3 prompts do not divide into 2 blocks"):
        pack_images([[], [], []], 2, 32)
    with pytest.raises(ValueError, match="9 exceeds the largest bucket 8"):
        smallest_bucket((4, 8), 9)
    assert smallest_bucket((4, 8), 5) == 8
