"""One encoded image -> checked, upright RGB pixels -> patches in the layout of the vision tower.

Owns everything that concerns a single image on the host: the guards against hostile or broken files, the target
size, the Pillow path (equal bit for bit to the PIL processor of transformers), the order of patches, and the rows and
weights of the learned position table. Does not pack images into batches (processor.py) and holds no state.

The one idea: normalisation acts on one byte at a time, so it is a table of 256 floats per channel. Preprocessed images
stay uint8, an eighth of the float patches with their repeated frame, and become floats when a batch is built.

Source: the Qwen2-VL PIL image processor of huggingface/transformers 5.23 (behaviour only).
"""

from __future__ import annotations

import functools
import io
import math
import struct
import warnings
import zlib

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

MERGE_SIZE = 2  # patches along one side of a merged vision token
MAX_ASPECT_RATIO = 200
MAX_IMAGE_PIXELS = 1 << 26  # default guard: 67 megapixels, 200 MB once decoded
MAX_IMAGE_BYTES = 1 << 26

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # few decoders, little to attack
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr")
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error)


def _open(data: bytes, max_image_pixels: int) -> Image.Image:
    """Reads the header only; the pixels of a bomb are never allocated."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError:
        raise ValueError(f"image has more pixels than max_image_pixels={max_image_pixels}; resize it") from None
    except UnidentifiedImageError:
        if _is_video(data):
            raise ValueError("this is a video: videos are not supported; give still frames as images") from None
        raise ValueError(f"not a readable image; supported: {', '.join(_FORMATS)}") from None
    except _BROKEN as error:
        raise ValueError(f"not a readable image ({_one_line(error)}); supported: {', '.join(_FORMATS)}") from None
    width, height = image.size
    if width * height > max_image_pixels:
        raise ValueError(
            f"image of {width}x{height} pixels exceeds max_image_pixels={max_image_pixels}; resize it or raise it"
        )
    if min(width, height) < 1 or max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(f"image of {width}x{height} pixels is longer than {MAX_ASPECT_RATIO} times its width; crop it")
    if image.mode not in _MODES:
        raise ValueError(f"image mode {image.mode} has more than 8 bits per channel; convert it to 8 bits")
    return image


def _is_video(data: bytes) -> bool:
    """MP4 and its kin (but not the still images of that container), Matroska and WebM, AVI, MPEG."""
    if data[4:8] == b"ftyp":
        return data[8:12] not in (b"avif", b"heic", b"heix", b"mif1")
    return data.startswith((b"\x1aE\xdf\xa3", b"\x00\x00\x01\xba")) or data[:4] + data[8:12] == b"RIFFAVI "


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _load_upright(image: Image.Image) -> Image.Image:
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except _BROKEN as error:
        raise ValueError(f"corrupt or truncated image ({_one_line(error)}); replace the file") from None


def check_image(data: bytes, max_image_pixels: int = MAX_IMAGE_PIXELS, max_image_bytes: int = MAX_IMAGE_BYTES) -> None:
    """Refuses an encoded image that could not be used: too big, of an unknown format, corrupt or truncated.

    The whole stream is read (only so is truncation seen), JPEG at an eighth of its size to save time and memory.

    Raises:
      ValueError: what is wrong and the remedy; the caller adds file and row.
    """
    if len(data) > max_image_bytes:
        raise ValueError(f"image file of {len(data)} bytes exceeds max_image_bytes={max_image_bytes}; re-encode it")
    image = _open(data, max_image_pixels)
    image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
    _load_upright(image)


def stored_size(data: bytes, max_image_pixels: int = MAX_IMAGE_PIXELS) -> tuple[int, int]:
    """(height, width) in pixels as stored, from the header alone. EXIF may swap them; the number of patches stays.

    Raises:
      ValueError: as `check_image`, except that broken pixel data goes unnoticed.
    """
    width, height = _open(data, max_image_pixels).size
    return height, width


def decode_rgb(data: bytes, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Decodes to an upright RGB image.

    Policy: the EXIF orientation is applied; transparency is composited onto white; of an animation the first frame
    is taken; grey, palette and CMYK are converted.

    Raises:
      ValueError: as `check_image`.
    """
    image = _load_upright(_open(data, max_image_pixels))
    if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    return image.convert("RGB")


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) to resize to: multiples of `factor`, area within the limits, aspect ratio nearly kept.

    `factor` is the side of a merged token in pixels. Rounding is Python's, half to even. With a factor of 32:
    80 rows are 2.5 units and become 64, 112 rows are 3.5 units and become 128. A very long, thin image can
    exceed `max_pixels`, because no side gets shorter than `factor`.

    Raises:
      ValueError: one side is more than 200 times the other.
    """
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ValueError(f"image of {width}x{height} pixels is longer than {MAX_ASPECT_RATIO} times its width; crop it")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        # the order of the divisions decides the last bit, and with it the grid
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def resize(image: Image.Image, height: int, width: int) -> UInt8[np.ndarray, "height width 3"]:
    """Bicubic resize of an RGB image on bytes, as Pillow does it (antialiased when shrinking)."""
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def patchify(pixels: UInt8[np.ndarray, "height width 3"], patch_size: int) -> UInt8[np.ndarray, "i 3 y z"]:
    """Cuts into patches [channel, y, z] in merge-block order: four consecutive patches make one merged token.

    A grid of 2 x 4 patches, numbered row by row, comes out as 0 1 4 5 | 2 3 6 7.
    """
    side = MERGE_SIZE * patch_size
    height, width, _ = pixels.shape
    blocks = pixels.reshape(height // side, MERGE_SIZE, patch_size, width // side, MERGE_SIZE, patch_size, 3)
    return np.ascontiguousarray(blocks.transpose(0, 3, 1, 4, 6, 2, 5)).reshape(-1, 3, patch_size, patch_size)


def normalisation_table(mean: tuple[float, ...], std: tuple[float, ...]) -> Float[np.ndarray, "3 256"]:
    """Normalised float32 value of every byte, per channel: byte / 255 rounded to float32, then (x - mean) / std."""
    unit = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    return (unit[None] - np.asarray(mean, np.float32)[:, None]) / np.asarray(std, np.float32)[:, None]


@functools.lru_cache(maxsize=1024)
def patch_positions(grid_height: int, grid_width: int) -> Int[np.ndarray, "i 2"]:
    """(row, column) of each patch of a grid, in merge-block order. The array is shared: do not write to it."""
    shape = (grid_height // MERGE_SIZE, grid_width // MERGE_SIZE, MERGE_SIZE, MERGE_SIZE)
    block_row, block_column, inner_row, inner_column = np.indices(shape, dtype=np.int32)
    rows, columns = block_row * MERGE_SIZE + inner_row, block_column * MERGE_SIZE + inner_column
    return np.stack([rows.ravel(), columns.ravel()], axis=-1)


@functools.lru_cache(maxsize=1024)
def interpolation_taps(
    grid_height: int, grid_width: int, table_side: int
) -> tuple[Int[np.ndarray, "i 4"], Float[np.ndarray, "i 4"]]:
    """Rows and bilinear weights (float32, summing to 1) in a square position table, in merge-block order.

    The corners of the image fall on the corners of the table. The arrays are shared: do not write to them.
    """
    positions = patch_positions(grid_height, grid_width)
    steps = np.maximum(np.array([grid_height, grid_width], np.float32) - 1, 1)
    source = positions.astype(np.float32) * np.float32(table_side - 1) / steps
    low = np.floor(source).astype(np.int32)
    high = np.minimum(low + 1, table_side - 1)
    fraction = source - low.astype(np.float32)
    row_taps, column_taps = np.stack([low, high], axis=-1).transpose(1, 0, 2)
    row_weights, column_weights = np.stack([1 - fraction, fraction], axis=-1).transpose(1, 0, 2)
    taps = row_taps[:, :, None] * table_side + column_taps[:, None, :]
    weights = row_weights[:, :, None] * column_weights[:, None, :]
    return taps.reshape(-1, 4), weights.reshape(-1, 4)
