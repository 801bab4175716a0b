"""Whole batches: padding, packing, gathers that end at the right pixels, the ladder, refusals, caches."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from safegrpo_jax.data import images
from safegrpo_jax.data.processor import INSTRUCTION, Processor, ProcessorConfig
from safegrpo_jax.data.records import Record

CONFIG = ProcessorConfig(
    patch_size=4,
    position_table_side=6,
    min_pixels=64,
    max_pixels=1024,
    prompt_buckets=(32, 64, 128),
    completion_buckets=(8, 16),
    patch_buckets=(16, 32, 64),
    instruction="judge",
)


def record(prompt="a knife", pictures=(), **fields):
    tags = {"text_tag": "safe", "image_tag": "unsafe", "combine_tag": "unsafe"}
    return Record(prompt=prompt, images=tuple(pictures), **{**tags, **fields})


@pytest.fixture
def processor(small_tokenizer):
    return Processor(small_tokenizer, CONFIG)


def expected_patches(data):
    """Float patches of one image, made the slow way."""
    picture = images.decode_rgb(data)
    target = images.smart_resize(picture.height, picture.width, 8, CONFIG.min_pixels, CONFIG.max_pixels)
    pixels = images.resize(picture, *target).astype(np.float64) / 255
    floats = ((pixels.astype(np.float32) - np.float32(0.5)) / np.float32(0.5)).transpose(2, 0, 1)
    rows, columns = target[0] // 4, target[1] // 4
    patches = []
    for block_row in range(0, rows, 2):
        for block_column in range(0, columns, 2):
            for row in (block_row, block_row + 1):
                for column in (block_column, block_column + 1):
                    patch = floats[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                    patches.append(np.stack([patch, patch], axis=1).ravel())
    return np.array(patches)


def test_prompts_are_left_padded(processor, small_tokenizer):
    records = [record("a"), record("a knife is unsafe, what is this? 1234567890", record_id=7)]
    batch = processor.encode_prompts(records)
    lengths = batch.prompt_mask.sum(1)
    assert batch.prompt_ids.shape == (2, 64) and lengths[0] < lengths[1]
    for b in range(2):
        real = batch.prompt_ids[b, -lengths[b] :].tolist()
        text = small_tokenizer.decode(real)
        assert text == f"<|im_start|>user\n{records[b].prompt}\n\njudge<|im_end|>\n<|im_start|>assistant\n<think>\n"
        assert (batch.prompt_ids[b, : -lengths[b]] == small_tokenizer.pad_token_id).all()
        assert not batch.prompt_mask[b, : -lengths[b]].any() and batch.prompt_mask[b, -lengths[b] :].all()
        assert batch.positions[:, b, -lengths[b] :].tolist() == [list(range(lengths[b]))] * 3
    assert batch.record_ids.tolist() == [0, 7] and batch.rope_delta.tolist() == [0, 0]


def test_every_vision_token_points_at_its_own_patches(processor, png):
    sizes = [[(16, 16)], [(8, 24), (30, 20)], [], [(8, 8), (16, 8), (8, 16)]]
    records = [
        record(f"prompt {b}", [png(*size, seed=10 * b + j) for j, size in enumerate(row)], record_id=b)
        for b, row in enumerate(sizes)
    ]
    batch = processor.encode_prompts(records, num_blocks=2)
    num_rows, row_size, values = batch.images.patches.shape
    assert row_size == 32 and values == 3 * 2 * 4 * 4 and num_rows % 2 == 0
    merged = batch.images.patches.reshape(num_rows * row_size // 4, 4, values)
    for b, one in enumerate(records):
        found = merged[batch.feature_index[b, batch.vision_mask[b]]].reshape(-1, values)
        expected = [expected_patches(data) for data in one.images]
        np.testing.assert_array_equal(found, np.concatenate([*expected, np.zeros((0, values))]))
        assert (batch.prompt_ids[b] == processor.chat.image_token_id).tolist() == batch.vision_mask[b].tolist()
        blocks = batch.feature_index[b, batch.vision_mask[b]] // (num_rows // 2 * row_size // 4)
        assert (blocks == b // 2).all()
    assert (batch.feature_index[~batch.vision_mask] == 0).all()


def test_images_of_a_row_are_told_apart_and_padding_is_zero(processor, png):
    batch = processor.encode_prompts([record("x", [png(8, 8), png(8, 16, 1)]), record("y", [png(8, 8, 2)])])
    packed = batch.images
    assert packed.segment_ids.tolist() == [[1] * 4 + [2] * 8 + [3] * 4]
    assert packed.patch_pos[0, :12].tolist() == [
        *([0, 0], [0, 1], [1, 0], [1, 1]),
        *([0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]),
    ]
    padded = processor.encode_prompts([record("x", [png(8, 8)])]).images
    assert padded.segment_ids.shape == (1, 16) and not padded.segment_ids[0, 4:].any()
    for field in ("patches", "patch_pos", "tap_ids", "tap_weights"):
        assert not getattr(padded, field)[0, 4:].any(), field


def test_batches_without_images_have_a_row_per_block(processor):
    batch = processor.encode_prompts([record("x")] * 6, num_blocks=3)
    assert batch.images.segment_ids.shape == (3, 16) and not batch.vision_mask.any()


def test_shapes_come_from_the_ladder(processor, png):
    shapes = set()
    for count in range(1, 13):
        batch = processor.encode_prompts([record("x", [png(16, 16, seed)]) for seed in range(count)])
        shapes.add(batch.images.patches.shape[:2] + batch.prompt_ids.shape[1:])
    assert shapes == {(rows, 16, 32) for rows in (1, 2, 3, 4, 6, 8, 12)}


def test_labels(processor):
    tagged = record(text_tag="unsafe", image_tag="safe", combine_tag="unsafe")
    question = record(text_tag="", image_tag="", combine_tag="", tagged=False)
    labels = processor.encode_prompts([tagged, question]).labels
    assert jax.tree.map(np.ndarray.tolist, (labels.visual, labels.text, labels.combined, labels.tagged)) == (
        [0, 0],
        [1, 0],
        [1, 0],
        [True, False],
    )


def test_plain_questions_have_no_instruction_and_no_reasoning(processor):
    batch = processor.encode_prompts([record("what is this?", tagged=False)])
    text = processor.decode(batch.prompt_ids[0][batch.prompt_mask[0]].tolist())
    assert text == "user\nwhat is this?\nassistant\n"


def test_instruction_file_replaces_the_text(small_tokenizer, tmp_path):
    file = tmp_path / "steps.txt"
    file.write_text("think hard\n")
    config = dataclasses.replace(CONFIG, instruction_file=str(file))
    batch = Processor(small_tokenizer, config).encode_prompts([record("x")])
    assert "x\n\nthink hard\nassistant" in processor_text(small_tokenizer, batch)
    with pytest.raises(ValueError, match=r"instruction_file .*gone\.txt"):
        Processor(small_tokenizer, dataclasses.replace(CONFIG, instruction_file=str(tmp_path / "gone.txt")))


def processor_text(tokenizer, batch):
    return tokenizer.decode(batch.prompt_ids[0][batch.prompt_mask[0]].tolist(), skip_special_tokens=True)


def test_default_instruction_names_every_marker():
    for marker in ("think", "visual_safe", "text_safe", "combined_safe", "answer"):
        assert f"<{marker}>" in INSTRUCTION and f"</{marker}>" in INSTRUCTION


def test_demonstrations(processor):
    records = [record("x", response="a</think>"), record("y", response="a red knife is unsafe", tagged=False)]
    batch = processor.encode_demonstrations(records)
    assert batch.completion_ids.shape[1] in CONFIG.completion_buckets
    for b, one in enumerate(records):
        ids = batch.completion_ids[b][batch.completion_mask[b]].tolist()
        assert processor.decode(ids) == one.response
        assert ids[-1] == processor.chat.eos_id
        assert batch.completion_mask[b].tolist() == sorted(batch.completion_mask[b].tolist(), reverse=True)
    np.testing.assert_array_equal(batch.prompts.prompt_ids, processor.encode_prompts(records).prompt_ids)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": "z" * 130}, "prompt of 1[0-9]+ tokens exceeds .*prompt_buckets"),
        ({"pictures": (5, 5, 5)}, "3 images exceed processor.max_images=2"),
        ({"pictures": (40,)}, "image of 100 patches exceeds .*patch_buckets"),
        ({"response": "z" * 20}, "response of 21 tokens exceeds .*completion_buckets"),
    ],
)
def test_too_long_is_refused_or_dropped_never_cut(small_tokenizer, png, changes, reason):
    config = dataclasses.replace(CONFIG, max_images=2, max_pixels=40 * 40)
    processor = Processor(small_tokenizer, config)
    fields = {"response": "ok", **changes}
    fields["pictures"] = [png(side, side) for side in fields.get("pictures", ())]
    bad, good = record(**fields, record_id=5, split="train"), record(response="ok")
    with pytest.raises(ValueError, match=f"record 5 of split 'train': {reason}"):
        processor.encode_demonstrations([good, bad])
    kept, dropped = processor.drop_too_long([bad, good])
    assert kept == [good] and [row.row for row in dropped] == [5]
    processor.encode_demonstrations(kept)


def test_other_refusals_name_the_record(processor, png):
    with pytest.raises(ValueError, match="record 3 of split '': corrupt or truncated"):
        processor.encode_prompts([record(pictures=[png(16, 16)[:-30]], record_id=3)])
    with pytest.raises(ValueError, match="record 4 .*2 <image> marks for 0 images"):
        processor.encode_prompts([record("<image><image>", record_id=4)])
    with pytest.raises(ValueError, match="no response"):
        processor.encode_demonstrations([record()])
    with pytest.raises(ValueError, match="3 records do not make 2 equal blocks"):
        processor.encode_prompts([record()] * 3, num_blocks=2)
    with pytest.raises(ValueError, match="0 records"):
        processor.encode_prompts([])


def test_shares_joined_are_the_batch(small_tokenizer, processor, png):
    """Each share has the shapes of the whole batch, whatever its own records need, and decodes no other image."""
    sizes = [(8, 8), (16, 24), (8, 16), (32, 32)]
    records = [
        record("a" * (1 + 9 * i), [png(*sizes[i], seed=i)] * (i % 3), response="b" * (1 + 3 * i)) for i in range(4)
    ]
    whole = processor.encode_demonstrations(records, num_blocks=4)
    num_features = whole.prompts.images.segment_ids.size // 4 // 2
    fresh = Processor(small_tokenizer, CONFIG)
    shares = [fresh.encode_demonstrations(records, num_blocks=4, share=(index, 2)) for index in range(2)]

    def compare(path, expected, first, second):
        if path[-1].name == "feature_index":
            second = np.where(shares[1].prompts.vision_mask, second + num_features, 0)
        axis = 1 if path[-1].name == "positions" else 0
        np.testing.assert_array_equal(np.concatenate([first, second], axis), expected, err_msg=str(path))

    jax.tree_util.tree_map_with_path(compare, whole, *shares)
    broken = png(8, 8)[:-30]  # its header is sound
    fresh.encode_prompts([record(pictures=[png(8, 8)]), record(pictures=[broken])], 2, (0, 2))
    with pytest.raises(ValueError, match="record 0"):
        fresh.encode_prompts([record(pictures=[png(8, 8)]), record(pictures=[broken])], 2, (1, 2))


def test_caches_change_nothing(small_tokenizer, processor, png):
    tight = Processor(small_tokenizer, dataclasses.replace(CONFIG, cache_bytes=500))  # holds two images of 16 patches
    batches = [
        [record(f"p{seed}", [png(16, 16, seed)], record_id=0) for seed in order]  # ids repeat, as across data sets
        for order in ((0, 1, 2), (2, 0, 3), (0, 1, 2))
    ]
    for records in batches:
        fresh = Processor(small_tokenizer, CONFIG).encode_prompts(records)
        for other in (tight, processor):
            jax.tree.map(np.testing.assert_array_equal, fresh, other.encode_prompts(records))


def test_tower_without_position_table(small_tokenizer, png):
    tableless = Processor(small_tokenizer, dataclasses.replace(CONFIG, position_table_side=0))
    records = [record("x", [png(8, 16)])]
    packed, usual = tableless.encode_prompts(records).images, Processor(small_tokenizer, CONFIG).encode_prompts(records)
    assert not packed.tap_ids.any() and not packed.tap_weights.any()
    for field in ("patches", "patch_pos", "segment_ids"):
        np.testing.assert_array_equal(getattr(packed, field), getattr(usual.images, field))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", {"vision_config": {"patch_size": 16}}, "patch_size is 16 but processor.patch_size is 4"),
        (
            "config.json",
            {"vision_config": {"num_position_embeddings": 2304}},
            "48 but processor.position_table_side is 6",
        ),
        ("config.json", {"vision_config": {"fullatt_block_indexes": [1]}}, "0 but processor.position_table_side is 6"),
        ("preprocessor_config.json", {"image_mean": [0.4, 0.5, 0.5]}, "image_mean is .* but processor.image_mean is"),
        ("preprocessor_config.json", {"temporal_patch_size": 1}, "temporal_patch_size is 1"),
    ],
)
def test_geometry_is_checked_against_the_folder(small_tokenizer, tmp_path, file, content, message):
    small_tokenizer.save_pretrained(tmp_path)
    matching = {
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 36,
    }
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": matching}))
    loaded = Processor.from_folder(tmp_path, CONFIG)
    direct = Processor(small_tokenizer, CONFIG)
    np.testing.assert_array_equal(
        loaded.encode_prompts([record()]).prompt_ids, direct.encode_prompts([record()]).prompt_ids
    )
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        Processor.from_folder(tmp_path, CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge_size": 3}, "merge_size is 3"),
        ({"prompt_buckets": ()}, "prompt_buckets"),
        ({"completion_buckets": (8, 4)}, "completion_buckets"),
        ({"patch_buckets": (6,)}, "multiples of 4"),
        ({"min_pixels": 2048}, "min_pixels 2048"),
        ({"image_std": (0.5,)}, "image_std"),
    ],
)
def test_config_is_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
