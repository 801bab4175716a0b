"""Windows as segments, against counts known from the published rule."""

import numpy as np
import pytest
from qwen_tiny import pack_images

from safegrpo_jax.models.windowed_vision import WindowedVisionConfig, window_ids


@pytest.mark.parametrize(
    ("grid", "sizes"),
    [((10, 14), [64, 48, 16, 12]), ((16, 16), [64] * 4), ((8, 8), [64]), ((2, 10), [16, 4]), ((18, 4), [32, 32, 8])],
)
def test_window_sizes(grid, sizes):
    images = pack_images([[grid]], row_len=grid[0] * grid[1] + 4)
    ids = np.asarray(window_ids(images.segment_ids, images.patch_pos, 8))[0]
    real = images.segment_ids[0] > 0
    assert (ids[~real] == 0).all() and (ids[real] > 0).all()
    assert sorted(np.unique(ids[real], return_counts=True)[1].tolist(), reverse=True) == sizes
    for window in np.unique(ids[real]):
        inside = images.patch_pos[0, ids == window]
        assert (np.ptp(inside, axis=0) < 8).all() and (inside // 8 == inside[0] // 8).all()


def test_images_share_no_window():
    images = pack_images([[(4, 4), (4, 4)], [(4, 4)]], row_len=32)
    ids = np.asarray(window_ids(images.segment_ids, images.patch_pos, 8))
    assert len(np.unique(ids[0])) == 2 and not set(ids[0, :16]) & set(ids[0, 16:])
    largest = np.array([[8191]], np.int32), np.array([[[4095, 4095]]], np.int32)
    assert window_ids(*largest, 8)[0, 0] == 2**31 - 1  # the limits fill int32 and do not overflow it


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"window_size": 100}, "window_size 100"), ({"full_layers": (3, 1)}, "full_layers"), ({"width": 30}, "width 30")],
)
def test_config_refuses(changes, message):
    sizes = {"width": 32, "mlp_width": 48, "num_layers": 4, "num_heads": 4, "out_width": 48, "full_layers": (1, 3)}
    with pytest.raises(ValueError, match=message):
        WindowedVisionConfig(**(sizes | changes))
