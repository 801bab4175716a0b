"""Image guards, target sizes, pixels against transformers, patch order, position taps."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from safegrpo_jax.data import images

ROUNDING = 1e-6  # float32 products of weights below 1, rounded in another order


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def random_image(height, width, mode="RGB", seed=0):
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((64, 64), (64, 64)),
        ((80, 112), (64, 128)),  # half units round to even: 2.5 -> 2, 3.5 -> 4
        ((48, 80), (64, 64)),  # 1.5 -> 2, 2.5 -> 2
        ((1, 1), (64, 64)),  # grown to the minimum area
        ((10, 100), (32, 224)),
        ((4000, 3000), (352, 256)),  # shrunk to the maximum area
        ((6400, 32), (4512, 32)),  # no side falls below the factor, so the maximum is exceeded
    ],
)
def test_smart_resize(size, expected):
    assert images.smart_resize(*size, factor=32, min_pixels=4096, max_pixels=102400) == expected


def test_smart_resize_refuses_extreme_shapes():
    with pytest.raises(ValueError, match="200 times"):
        images.smart_resize(10, 2001, 32, 4096, 102400)


def test_smart_resize_equals_transformers():
    theirs = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl").smart_resize
    rng = np.random.default_rng(0)
    for height, width in np.exp(rng.uniform(np.log(4), np.log(5000), (800, 2))).astype(int).tolist():
        if max(height, width) > 200 * min(height, width):
            continue
        for limits in ((28, 3136, 100352), (32, 65536, 1 << 20), (16, 256, 4096)):
            assert images.smart_resize(height, width, *limits) == theirs(height, width, *limits)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("size", [(64, 64), (50, 150), (333, 97), (20, 31)])
def test_pixels_equal_transformers_bit_for_bit(mode, size):
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    mean, std, side = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), 16
    processor = module.Qwen2VLImageProcessorPil(
        patch_size=side, image_mean=mean, image_std=std, size={"shortest_edge": 4096, "longest_edge": 16384}
    )
    data = encode(random_image(*size, mode=mode))
    theirs = processor(Image.open(io.BytesIO(data)), return_tensors="np")
    target = images.smart_resize(*size, 2 * side, 4096, 16384)
    patches = images.patchify(images.resize(images.decode_rgb(data), *target), side)
    floats = np.stack([images.normalisation_table(mean, std)[c][patches[:, c]] for c in range(3)], axis=1)
    ours = np.repeat(floats[:, :, None], 2, axis=2).reshape(len(patches), -1)
    np.testing.assert_array_equal(theirs["image_grid_thw"], [[1, target[0] // side, target[1] // side]])
    np.testing.assert_array_equal(ours, theirs["pixel_values"])


def test_patches_come_in_merge_blocks():
    side = 4
    numbers = np.arange(4 * 6).reshape(4, 6)
    pixels = np.repeat(np.repeat(numbers, side, 0), side, 1).astype(np.uint8)
    patches = images.patchify(np.stack([pixels, pixels + 1, pixels + 2], axis=-1), side)
    expected = [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11, 12, 13, 18, 19, 14, 15, 20, 21, 16, 17, 22, 23]
    np.testing.assert_array_equal(patches[:, 0, 0, 0], expected)
    np.testing.assert_array_equal(patches[:, 2, -1, -1], np.array(expected) + 2)
    positions = images.patch_positions(4, 6)
    np.testing.assert_array_equal(positions[:, 0] * 6 + positions[:, 1], expected)


def test_pixels_inside_a_patch_keep_their_place():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    patches = images.patchify(pixels, 4)
    np.testing.assert_array_equal(patches[1], pixels[:4, 4:].transpose(2, 0, 1))


def test_taps_interpolate_linear_tables_exactly():
    side, height, width = 48, 6, 10
    rows, columns = np.divmod(np.arange(side * side), side)
    taps, weights = images.interpolation_taps(height, width, side)
    positions = images.patch_positions(height, width)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=ROUNDING)
    for table, axis, size in ((rows, 0, height), (columns, 1, width)):
        found = (table[taps] * weights).sum(-1)
        np.testing.assert_allclose(found, positions[:, axis] * (side - 1) / (size - 1), atol=side * ROUNDING)


def test_taps_of_one_row_of_patches_stay_in_the_table():
    taps, weights = images.interpolation_taps(2, 48, 8)
    assert taps.min() >= 0 and taps.max() == 63 and weights.min() >= 0


@pytest.mark.parametrize("grid", [(4, 6), (14, 38), (64, 2), (48, 48), (100, 20)])
def test_taps_equal_transformers(grid):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.vision_utils").get_vision_interpolation_indices_and_weights
    indices, weights = theirs(torch.tensor([[1, *grid]]), 48, mode="bilinear", align_corners=True, spatial_merge_size=2)
    ours_indices, ours_weights = images.interpolation_taps(*grid, 48)
    np.testing.assert_array_equal(ours_indices, indices.numpy())
    np.testing.assert_allclose(ours_weights, weights.numpy(), atol=ROUNDING)


def test_transparency_becomes_white():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert images.decode_rgb(encode(image)).getpixel((3, 3)) == (255, 255, 255)


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (32, 16), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    data = encode(image, "JPEG", exif=exif)
    assert images.decode_rgb(data).size == (16, 32)
    assert images.stored_size(data) == (16, 32)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("BMP", {}), ("GIF", {})],
)
def test_whole_images_pass_and_truncated_ones_do_not(kind, options):
    data = encode(random_image(70, 90), kind, **options)
    images.check_image(data)
    for keep in (0.3, 0.9):
        with pytest.raises(ValueError, match=r"truncated|not a readable image"):
            images.check_image(data[: int(keep * len(data))])


def test_damaged_bytes_raise_only_value_errors():
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP"):
        data = encode(random_image(20, 20), kind)
        for _ in range(60):
            damaged = bytearray(data)
            for place in rng.integers(0, min(len(data), 200), 4):
                damaged[place] = rng.integers(0, 256)
            try:
                images.decode_rgb(bytes(damaged), max_image_pixels=10_000)
            except ValueError as error:
                assert "\n" not in str(error)


def test_bomb_is_refused_by_its_header():
    data = bytearray(encode(random_image(4, 4)))
    data[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height in the header of a PNG
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    with pytest.raises(ValueError, match="max_image_pixels=1000000"):
        images.check_image(bytes(data), max_image_pixels=1_000_000)
    with pytest.raises(ValueError, match="60x50.*max_image_pixels=2999"):
        images.check_image(encode(random_image(50, 60)), max_image_pixels=2999)


@pytest.mark.parametrize(
    "head",
    [b"\0\0\0\x20ftypisom", b"\0\0\0\x14ftypqt  ", b"\x1aE\xdf\xa3", b"RIFF\x99\0\0\0AVI LIST", b"\0\0\x01\xba"],
    ids=["mp4", "mov", "webm", "avi", "mpeg"],
)
def test_videos_are_refused_as_such(head):
    with pytest.raises(ValueError, match="this is a video: videos are not supported; give still frames"):
        images.check_image(head + bytes(200))


def test_still_images_of_other_formats_are_no_videos():
    with pytest.raises(ValueError, match="not a readable image; supported: JPEG"):
        images.check_image(b"\0\0\0\x20ftypavif" + bytes(200))


def test_other_refusals():
    with pytest.raises(ValueError, match="max_image_bytes=10"):
        images.check_image(encode(random_image(4, 4)), max_image_bytes=10)
    with pytest.raises(ValueError, match="200 times"):
        images.check_image(encode(Image.new("RGB", (401, 2))))
    with pytest.raises(ValueError, match="8 bits"):
        images.check_image(encode(Image.fromarray(np.full((4, 4), 40_000, np.uint16))))
    with pytest.raises(ValueError, match="not a readable image"):
        images.check_image(b"<svg></svg>")
