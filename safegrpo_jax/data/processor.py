"""Records -> fixed-shape numpy Prompts and Demonstrations: tokenized, resized, packed, padded.

Owns the assembly of a batch, the ladder of shapes, and the check of the vision geometry against a checkpoint; text is
chat.py's, one image images.py's, index arithmetic packing.py's. Does not choose which records make a batch
(pipeline.py) and touches no device.

The one idea: everything that depends on an image size or a text length becomes an index array here, so that compiled
programs see a few shapes. What is made of an image or a prompt is kept, because training meets each again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from transformers import PreTrainedTokenizerBase

from safegrpo_jax.data import images
from safegrpo_jax.data.cache import SizedCache
from safegrpo_jax.data.chat import ChatTokenizer
from safegrpo_jax.data.packing import ExpandedPrompt, expand_images, pack_images, share_of, smallest_bucket
from safegrpo_jax.data.records import BadRow, Record
from safegrpo_jax.types import SAFE, UNSAFE, Demonstrations, Labels, PackedImages, Prompts

INSTRUCTION = """\
Take five steps before you reply, and keep all of them between <think> and </think>.
1. Describe what the image shows.
2. Look at the image alone and give its verdict: <visual_safe>safe</visual_safe> or <visual_safe>unsafe</visual_safe>.
3. Look at the text alone and give its verdict: <text_safe>safe</text_safe> or <text_safe>unsafe</text_safe>.
4. Consider what image and text mean together and give that verdict: <combined_safe>safe</combined_safe> or \
<combined_safe>unsafe</combined_safe>. Two harmless parts can be dangerous together, and an alarming part harmless.
5. Sum up and decide how to reply.
After </think>, write the reply between <answer> and </answer>. If the combination is unsafe, decline politely and \
give the reason; if it is safe, help as well as you can."""

_LABELS = {"safe": SAFE, "unsafe": UNSAFE}
_MAX_CACHED_TEXTS = 1 << 16


@dataclasses.dataclass(frozen=True)
class ProcessorConfig:
    """Geometry of the vision tower (the checkpoint's), limits, and the ladder of shapes.

    `position_table_side` 0: the tower has no position table. That is Qwen2.5-VL, which also has patches of 14 pixels,
    mean 0.48145466, 0.4578275, 0.40821073 and std 0.26862954, 0.26130258, 0.27577711.
    `min_pixels` and `max_pixels` bound the area of an image after resizing. Buckets ascend; a batch takes the smallest
    that fits and nothing is ever cut. A patch bucket is the size of a packing row. `instruction` follows the prompt of
    tagged records; the text of `instruction_file`, where named, replaces it. `cache_bytes` bounds the kept images.
    """

    patch_size: int = 16
    merge_size: int = images.MERGE_SIZE
    temporal_patch_size: int = 2
    position_table_side: int = 48
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    min_pixels: int = 65536
    max_pixels: int = 1 << 20
    max_image_pixels: int = images.MAX_IMAGE_PIXELS
    max_images: int = 8
    prompt_buckets: tuple[int, ...] = (512, 1024, 2048)
    completion_buckets: tuple[int, ...] = (512, 1024, 2048, 4096)
    patch_buckets: tuple[int, ...] = (1024, 2048, 4096)
    instruction: str = INSTRUCTION
    instruction_file: str = ""
    cache_bytes: int = 1 << 29

    def __post_init__(self) -> None:
        """Raises ValueError naming the key."""
        if self.merge_size != images.MERGE_SIZE:
            raise ValueError(f"processor.merge_size is {self.merge_size}; only {images.MERGE_SIZE} is supported")
        if len(self.image_mean) != 3 or len(self.image_std) != 3:
            raise ValueError("processor.image_mean and processor.image_std need three values, one per colour")
        for name in ("prompt_buckets", "completion_buckets", "patch_buckets"):
            buckets = list(getattr(self, name))
            if not buckets or buckets != sorted(set(buckets)) or buckets[0] < 1:
                raise ValueError(f"processor.{name} is {buckets}; give one or more sizes in ascending order")
        if any(bucket % self.merge_size**2 for bucket in self.patch_buckets):
            raise ValueError(f"processor.patch_buckets {self.patch_buckets} must be multiples of {self.merge_size**2}")
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(f"processor.min_pixels {self.min_pixels} must be in 1..max_pixels ({self.max_pixels})")


def check_geometry(folder: str | pathlib.Path, config: ProcessorConfig) -> None:
    """Compares `config` with config.json and preprocessor_config.json of a model folder, where these exist.

    Pixel limits are not compared: a lower `max_pixels` is a choice, another patch size an error.

    Raises:
      ValueError: names the file, the key, both values, and the config field to set.
    """
    pairs: list[tuple[str, str, Any, str]] = []
    vision = _read_json(pathlib.Path(folder) / "config.json").get("vision_config", {})
    pairs += [
        ("config.json", key, vision.get(key), field)
        for key, field in (
            ("patch_size", "patch_size"),
            ("spatial_merge_size", "merge_size"),
            ("temporal_patch_size", "temporal_patch_size"),
        )
    ]
    table = vision.get("num_position_embeddings")
    side = None if table is None else math.isqrt(table)
    if "fullatt_block_indexes" in vision:
        side = 0  # windowed towers have no table
    pairs.append(("config.json", "num_position_embeddings ** 0.5", side, "position_table_side"))
    preprocessor = _read_json(pathlib.Path(folder) / "preprocessor_config.json")
    pairs += [
        ("preprocessor_config.json", key, preprocessor.get(key), key)
        for key in ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std")
    ]
    for file, key, theirs, field in pairs:
        theirs = tuple(theirs) if isinstance(theirs, list) else theirs
        ours = getattr(config, field)
        if theirs is not None and theirs != ours:
            raise ValueError(f"{folder}/{file}: {key} is {theirs} but processor.{field} is {ours}; set it to {theirs}")


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy it again") from None


class EncodedImage(NamedTuple):
    """Patches as bytes in merge-block order, and the grid (height, width) in patches."""

    patches: UInt8[np.ndarray, "i 3 y z"]
    grid: tuple[int, int]


class Processor:
    """Turns records into batches. Public attributes: `config` and `chat` (tokenizer, template and their ids)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | ChatTokenizer, config: ProcessorConfig):
        """Raises ValueError where the tokenizer will not do, or `config.instruction_file` cannot be read."""
        self.chat = tokenizer if isinstance(tokenizer, ChatTokenizer) else ChatTokenizer(tokenizer)
        self.config = config
        self._instruction = config.instruction
        if config.instruction_file:
            try:
                self._instruction = pathlib.Path(config.instruction_file).read_text(encoding="utf-8").strip()
            except (OSError, ValueError) as error:
                raise ValueError(f"processor.instruction_file {config.instruction_file}: {error}") from None
        self._byte_values = images.normalisation_table(config.image_mean, config.image_std)
        self._images = SizedCache(config.cache_bytes)
        self._texts = SizedCache(_MAX_CACHED_TEXTS)

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path, config: ProcessorConfig) -> Processor:
        """Takes tokenizer and template from a Hugging Face folder and checks `config` against its geometry.

        Raises:
          ValueError: no such folder, tokenizer files or template missing, another geometry.
        """
        chat = ChatTokenizer.from_folder(folder)
        check_geometry(folder, config)
        return cls(chat, config)

    def encode_prompts(
        self, records: Sequence[Record], num_blocks: int = 1, share: tuple[int, int] = (0, 1)
    ) -> Prompts:
        """Tokenizes, left-pads and packs a batch. Prompts of block j use packing rows of block j only.

        Shapes come from the ladder: prompt length and patches per row from the buckets, rows per block from
        `pack_images`; without images there is one row of padding per block. Of several processes that share a batch,
        number `share[0]` of `share[1]` gets its part of the rows, in the shapes of the whole; feature indices count
        from its own packing rows.

        Raises:
          ValueError: no records, a number of them that `num_blocks` does not divide, a record too long for the
            largest bucket or an image that does not decode; names the record.
        """
        if not records or len(records) % num_blocks or num_blocks % share[1]:
            raise ValueError(
                f"{len(records)} records do not make {num_blocks} equal blocks for {share[1]}; adapt the batch size"
            )
        own = share_of(len(records), share)
        pictures = [self._record_images(record) for record in records[own]]
        grids = [[image.grid for image in row] for row in pictures]
        # Other processes' images are not decoded: their sizes are enough for the shapes.
        grids = [*map(self._grids, records[: own.start]), *grids, *map(self._grids, records[own.stop :])]
        prompts = [self._expand(record, row) for record, row in zip(records, grids, strict=True)]
        counts = [[height * width for height, width in row] for row in grids]
        for record, prompt, row in zip(records, prompts, counts, strict=True):
            self._refuse(record, self._excess(len(prompt.token_ids), row))
        packed, places = self._pack(pictures, counts, num_blocks, share)
        row_size = packed.segment_ids.shape[1]
        length = smallest_bucket(self.config.prompt_buckets, max(len(prompt.token_ids) for prompt in prompts))
        records, prompts = records[own], prompts[own]
        ids = np.full((len(records), length), self.chat.pad_id, np.int32)
        mask, vision_mask = np.zeros((2, *ids.shape), bool)
        positions, feature_index = np.zeros((3, *ids.shape), np.int32), np.zeros(ids.shape, np.int32)
        for b, prompt in enumerate(prompts):
            start = length - len(prompt.token_ids)
            ids[b, start:], mask[b, start:] = prompt.token_ids, True
            vision_mask[b, start:], positions[:, b, start:] = prompt.vision_mask, prompt.positions
            first = [(row * row_size + offset) // images.MERGE_SIZE**2 for row, offset in places[b]]
            count = [len(image.patches) // images.MERGE_SIZE**2 for image in pictures[b]]
            feature_index[b, vision_mask[b]] = [i for f, c in zip(first, count, strict=True) for i in range(f, f + c)]
        return Prompts(
            prompt_ids=ids,
            prompt_mask=mask,
            positions=positions,
            rope_delta=np.array([prompt.rope_delta for prompt in prompts], np.int32),
            vision_mask=vision_mask,
            feature_index=feature_index,
            record_ids=np.array([record.record_id for record in records], np.int32),
            images=packed,
            labels=_labels(records),
        )

    def encode_demonstrations(
        self, records: Sequence[Record], num_blocks: int = 1, share: tuple[int, int] = (0, 1)
    ) -> Demonstrations:
        """As `encode_prompts`, with the response of each record, encoded as one text and closed by the end token.

        Where the template already opens the reasoning, an opening `<think>` of the response is left out.

        Raises:
          ValueError: as `encode_prompts`, or a response that is empty or too long for the largest bucket.
        """
        for record in records:
            self._refuse(record, "" if record.response else "has no response to imitate; fill the response column")
            self._refuse(record, self._response_excess(record))
        prompts = self.encode_prompts(records, num_blocks, share)
        responses = [self._response(record) for record in records]
        length = smallest_bucket(self.config.completion_buckets, max(map(len, responses)))
        responses = responses[share_of(len(responses), share)]
        ids = np.full((len(responses), length), self.chat.pad_id, np.int32)
        mask = np.zeros(ids.shape, bool)
        for b, response in enumerate(responses):
            ids[b, : len(response)], mask[b, : len(response)] = response, True
        return Demonstrations(prompts, ids, mask)

    def drop_too_long(self, records: Sequence[Record]) -> tuple[list[Record], list[BadRow]]:
        """(records that fit the largest buckets, the others with the reason). Reads headers of images only.

        Raises:
          ValueError: an image whose header cannot be read; names the record.
        """
        kept, dropped = [], []
        for record in records:
            grids = self._grids(record)
            excess = self._excess(len(self._expand(record, grids).token_ids), [h * w for h, w in grids])
            excess = excess or (self._response_excess(record) if record.response else "")
            if excess:
                dropped.append(BadRow(record.split, record.record_id, excess))
            else:
                kept.append(record)
        return kept, dropped

    def decode(self, token_ids: Sequence[int], keep_special: bool = False) -> str:
        """Text of ids; `keep_special` shows special tokens such as `<|im_end|>`."""
        return self.chat.decode(token_ids, keep_special)

    def _record_images(self, record: Record) -> list[EncodedImage]:
        return [
            self._images.get(data, lambda data=data: self._guard(record, self._encode_image, data), _image_bytes)
            for data in record.images
        ]

    def _encode_image(self, data: bytes) -> EncodedImage:
        picture = images.decode_rgb(data, self.config.max_image_pixels)
        grid = self._grid(picture.height, picture.width)
        pixels = images.resize(picture, grid[0] * self.config.patch_size, grid[1] * self.config.patch_size)
        return EncodedImage(images.patchify(pixels, self.config.patch_size), grid)

    def _grids(self, record: Record) -> list[tuple[int, int]]:
        """Grids of the images, from their headers."""
        sizes = [self._guard(record, images.stored_size, data) for data in record.images]
        return [self._guard(record, self._grid, *size) for size in sizes]

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        factor = self.config.patch_size * self.config.merge_size
        target = images.smart_resize(height, width, factor, self.config.min_pixels, self.config.max_pixels)
        return target[0] // self.config.patch_size, target[1] // self.config.patch_size

    def _expand(self, record: Record, grids: Sequence[tuple[int, int]]) -> ExpandedPrompt:
        key = (record.prompt, record.tagged, tuple(grids))
        return self._texts.get(
            key, lambda: self._guard(record, expand_images, self._prompt_ids(record), self.chat.image_token_id, grids)
        )

    def _prompt_ids(self, record: Record) -> list[int]:
        instruction = self._instruction if record.tagged else ""
        return self._guard(
            record, self.chat.encode_prompt, record.prompt, len(record.images), instruction, record.tagged
        )

    def _response(self, record: Record) -> list[int]:
        key = (record.prompt, record.tagged, len(record.images), record.response)
        return self._texts.get(key, lambda: self.chat.encode_response(record.response, self._prompt_ids(record)))

    def _excess(self, num_tokens: int, patch_counts: list[int]) -> str:
        """What is too long about a prompt, "" where all fits."""
        config = self.config
        if len(patch_counts) > config.max_images:
            return f"{len(patch_counts)} images exceed processor.max_images={config.max_images}; drop the record"
        if max(patch_counts, default=0) > config.patch_buckets[-1]:
            return (
                f"image of {max(patch_counts)} patches exceeds the largest of processor.patch_buckets "
                f"{config.patch_buckets}; lower processor.max_pixels or add a bucket"
            )
        if num_tokens > config.prompt_buckets[-1]:
            return (
                f"prompt of {num_tokens} tokens exceeds the largest of processor.prompt_buckets "
                f"{config.prompt_buckets}; drop the record, lower processor.max_pixels or add a bucket"
            )
        return ""

    def _response_excess(self, record: Record) -> str:
        num_tokens, buckets = len(self._response(record)), self.config.completion_buckets
        if num_tokens <= buckets[-1]:
            return ""
        return f"response of {num_tokens} tokens exceeds the largest of processor.completion_buckets {buckets}"

    def _refuse(self, record: Record, reason: str) -> None:
        if reason:
            raise ValueError(f"record {record.record_id} of split {record.split!r}: {reason}")

    def _guard(self, record: Record, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls `function`, naming the record in its ValueError."""
        try:
            return function(*arguments)
        except ValueError as error:
            raise ValueError(f"record {record.record_id} of split {record.split!r}: {error}") from None

    def _pack(
        self, pictures: list[list[EncodedImage]], counts: list[list[int]], num_blocks: int, share: tuple[int, int]
    ) -> tuple[PackedImages, list[list[tuple[int, int]]]]:
        """Fills the packing rows of the share. `counts`: patches of the images of the whole batch.

        Places are (row of the share, offset in patches), as the images of `pictures`.
        """
        largest = max((count for row in counts for count in row), default=0)
        row_size = smallest_bucket(self.config.patch_buckets, largest)
        places, rows_per_block = pack_images(counts, num_blocks, row_size)
        rows = share_of(num_blocks * rows_per_block, share)
        places = [
            [(row - rows.start, offset) for row, offset in prompt] for prompt in places[share_of(len(places), share)]
        ]
        shape = (rows.stop - rows.start, row_size)
        side = self.config.patch_size
        pixels = np.zeros((*shape, 3, side, side), np.uint8)
        patch_pos, segment_ids = np.zeros((*shape, 2), np.int32), np.zeros(shape, np.int32)
        tap_ids, tap_weights = np.zeros((*shape, 4), np.int32), np.zeros((*shape, 4), np.float32)
        for image, (row, offset) in zip(
            (image for images_of_prompt in pictures for image in images_of_prompt),
            (place for places_of_prompt in places for place in places_of_prompt),
            strict=True,
        ):
            here = (row, slice(offset, offset + len(image.patches)))
            pixels[here] = image.patches
            patch_pos[here] = images.patch_positions(*image.grid)
            if self.config.position_table_side:
                taps = images.interpolation_taps(*image.grid, self.config.position_table_side)
                tap_ids[here], tap_weights[here] = taps
            segment_ids[here] = segment_ids[row].max() + 1
        return PackedImages(self._to_floats(pixels, segment_ids), patch_pos, tap_ids, tap_weights, segment_ids), places

    def _to_floats(self, pixels: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
        """Normalised patches with values in the order (channel, frame, y, x), the frame repeated; 0 where padding."""
        frames = np.empty((*pixels.shape[:3], self.config.temporal_patch_size, *pixels.shape[3:]), np.float32)
        for channel, values in enumerate(self._byte_values):
            frames[:, :, channel] = values[pixels[:, :, channel]][:, :, None]
        frames[segment_ids == 0] = 0
        return frames.reshape(*segment_ids.shape, -1)


def _labels(records: Sequence[Record]) -> Labels:
    def values(tags: list[str]) -> np.ndarray:
        return np.array(
            [_LABELS[tag] if record.tagged else SAFE for tag, record in zip(tags, records, strict=True)], np.int32
        )

    return Labels(
        visual=values([record.image_tag for record in records]),
        text=values([record.text_tag for record in records]),
        combined=values([record.combine_tag for record in records]),
        tagged=np.array([record.tagged for record in records], bool),
    )


def _image_bytes(image: EncodedImage) -> int:
    return image.patches.nbytes
