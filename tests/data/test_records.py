"""Reading parquet and JSONL, and every kind of bad input with its file and row."""

import base64
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from safegrpo_jax.data.records import BadRow, Record, read_records, write_bad_rows


@pytest.fixture
def row(png):
    """`row(**changes)`: a valid parquet row."""

    def make(**changes):
        images = [{"bytes": png(8, 12), "path": "a.png"}]
        good = {"prompt": "p", "images": images, "text_tag": "safe", "image_tag": "unsafe", "combine_tag": "safe"}
        return {**good, **changes}

    return make


def write_parquet(path, rows):
    names = {name: None for row in rows for name in row}
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path)
    return path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_parquet_as_hugging_face_writes_it(tmp_path, row, png):
    rows = [row(), row(prompt="q", category="c", response="r", answer="a", tagged=False, images=[])]
    write_parquet(tmp_path / "train-00000-of-00001.parquet", rows)
    records, bad = read_records(tmp_path, "train")
    assert bad == []
    assert records[0] == Record("p", (png(8, 12),), "safe", "unsafe", "safe", split="train")
    assert records[1] == Record(
        "q", (), "safe", "unsafe", "safe", "c", "train", "r", tagged=False, answer="a", record_id=1
    )


def test_parquet_with_plain_binary_images(tmp_path, row, png):
    write_parquet(tmp_path / "x.parquet", [row(images=[png(8, 8), png(9, 9)])])
    assert read_records(tmp_path / "x.parquet", "train")[0][0].images == (png(8, 8), png(9, 9))


def test_files_of_a_split_are_read_in_order_and_others_left(tmp_path, row):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("test-00001", "test-00000", "test_other", "train"):
        write_parquet(folder / f"{name}.parquet", [row(prompt=name)] * 2)
    records, _ = read_records(tmp_path, "test")
    assert [record.prompt for record in records] == ["test-00000"] * 2 + ["test-00001"] * 2
    assert [record.record_id for record in records] == [0, 1, 2, 3]


def test_split_column_selects_rows(tmp_path, row):
    write_parquet(tmp_path / "all.parquet", [row(prompt=name, split=name) for name in ("train", "test", "train")])
    records, _ = read_records(tmp_path / "all.parquet", "test")
    assert [(record.prompt, record.split) for record in records] == [("test", "test")]


def test_jsonl_with_files_and_base64(tmp_path, row, png):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png(8, 8))
    text = base64.b64encode(png(9, 9)).decode()
    path = write_jsonl(tmp_path / "train.jsonl", [row(images=["pictures/a.png", {"base64": text}])])
    assert read_records(path, "train")[0][0].images == (png(8, 8), png(9, 9))


def test_photographs_of_several_sizes(tmp_path, row):
    datasets = pytest.importorskip("sklearn.datasets")
    rows = []
    for photograph in datasets.load_sample_images().images:
        for divisor in (1, 3, 7):
            buffer = io.BytesIO()
            image = Image.fromarray(photograph)
            image.resize((image.width // divisor, image.height // divisor)).save(buffer, "JPEG")
            rows.append(row(images=[{"bytes": buffer.getvalue(), "path": None}]))
    records, _ = read_records(write_parquet(tmp_path / "train.parquet", rows), "train")
    assert [record.images[0] for record in records] == [row["images"][0]["bytes"] for row in rows]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"combine_tag": "Safe"}, "combine_tag is 'Safe'; it must be one of safe, unsafe"),
        ({"text_tag": None}, "text_tag is 'None', not text"),
        ({"prompt": None}, "prompt is 'None', not text"),
        ({"prompt": " ", "images": []}, "prompt is empty and there is no image"),
        ({"prompt": "<image> and <image>"}, "prompt has 2 <image> marks for 1 images"),
        ({"images": [{"bytes": b"GIF89a", "path": ""}]}, "image 0: not a readable image"),
        ({"images": [{"bytes": None, "path": None}]}, "image 0 is neither bytes"),
        ({"images": [{"bytes": None, "path": "/etc/hostname"}]}, "lies outside"),
        ({"videos": [b"mp4"]}, "videos is filled: videos are not supported"),
        ({"video": {"bytes": b"mp4", "path": None}}, "video is filled: videos are not supported"),
        ({"prompt": "<video>look"}, "prompt has a <video> mark: videos are not supported"),
        ({"images": [{"bytes": b"\0\0\0\x18ftypmp42" + bytes(99), "path": "a.mp4"}]}, "image 0: this is a video"),
    ],
)
def test_bad_parquet_rows(tmp_path, row, changes, reason):
    path = write_parquet(tmp_path / "train.parquet", [row(), row(**changes), row()])
    with pytest.raises(ValueError) as raised:
        read_records(path, "train")
    assert str(raised.value).startswith(f"{path}, row 1: ") and reason in str(raised.value)
    assert "\n" not in str(raised.value) and "on_bad_row" in str(raised.value)
    records, bad = read_records(path, "train", on_bad_row="skip")
    assert [record.record_id for record in records] == [0, 2]
    assert [(one.file, one.row) for one in bad] == [(str(path), 1)] and reason in bad[0].reason


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (["../secret.png"], "lies outside"),
        (["sub/../../secret.png"], "lies outside"),
        (["link.png"], "lies outside"),
        (["/etc/hostname"], "lies outside"),
        (["http://host/a.png"], "is a URL"),
        (["file:///etc/hostname"], "is a URL"),
        (["data:image/png;base64,AAAA"], "is a URL"),
        (["missing.png"], "does not exist"),
        (["nul\0l.png"], "not a usable file name"),
        (["n" * 5000], "not a usable file name"),
        ([{"base64": "&&&"}], "not valid base64"),
        (["big.png"], "exceeds max_image_bytes"),
        ("a.png", "images is not a list"),
        ([7], "neither bytes"),
    ],
)
def test_bad_jsonl_images(tmp_path, row, png, images, reason):
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(png(8, 8))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "big.png").write_bytes(b"0" * 3000)
    path = write_jsonl(folder / "train.jsonl", [row(images=images)])
    with pytest.raises(ValueError, match=reason):
        read_records(path, "train", max_image_bytes=2000)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ('{"prompt": "p"}', "has no field 'images'"),
        (
            '{"prompt": "\\ud800", "images": [], "text_tag": "safe", "image_tag": "safe", "combine_tag": "safe"}',
            "surrog",
        ),
        (
            '{"tagged": 1, "prompt": "", "images": [], "text_tag": "", "image_tag": "", "combine_tag": ""}',
            "tagged is 1",
        ),
    ],
)
def test_bad_jsonl_lines(tmp_path, line, reason):
    path = tmp_path / "train.jsonl"
    path.write_text("\n" + line + "\n")
    with pytest.raises(ValueError, match=f"row 1: .*{reason}"):
        read_records(path, "train")


def test_truncated_and_huge_images(tmp_path, row):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "JPEG")
    data = buffer.getvalue()
    cut = write_parquet(tmp_path / "cut.parquet", [row(images=[{"bytes": data[:-400], "path": ""}])])
    with pytest.raises(ValueError, match="row 0: image 0: corrupt or truncated"):
        read_records(cut, "train")
    whole = write_parquet(tmp_path / "whole.parquet", [row(images=[{"bytes": data, "path": ""}])])
    with pytest.raises(ValueError, match="row 0: image 0: image of 64x64 pixels exceeds max_image_pixels=4095"):
        read_records(whole, "train", max_image_pixels=4095)
    with pytest.raises(ValueError, match="exceeds max_image_bytes=100"):
        read_records(whole, "train", max_image_bytes=100)
    assert len(read_records(whole, "train")[0]) == 1


@pytest.mark.parametrize("on_bad_row", ["raise", "skip"])
def test_bad_files(tmp_path, row, on_bad_row):
    def read(path, split="train"):
        return read_records(path, split, on_bad_row=on_bad_row)

    with pytest.raises(ValueError, match=r"gone\.parquet does not exist"):
        read(tmp_path / "gone.parquet")
    with pytest.raises(ValueError, match=r"no train\*\.parquet"):
        read(tmp_path)
    (tmp_path / "x.csv").write_text("")
    with pytest.raises(ValueError, match=r"unknown file type '\.csv'"):
        read(tmp_path / "x.csv")
    lacking = row()
    del lacking["image_tag"]
    with pytest.raises(ValueError, match=r"lacking\.parquet has no column 'image_tag'; it has prompt, images"):
        read(write_parquet(tmp_path / "lacking.parquet", [lacking]))
    (tmp_path / "torn.parquet").write_bytes(write_parquet(tmp_path / "a.parquet", [row()]).read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"torn\.parquet is not a readable parquet"):
        read(tmp_path / "torn.parquet")
    with pytest.raises(ValueError, match="split 'dev' has no usable rows"):
        read(write_parquet(tmp_path / "other.parquet", [row(split="train")]), "dev")
    with pytest.raises(ValueError, match="row 0: text_tag" if on_bad_row == "raise" else r"no usable rows \(1 bad\)"):
        read(write_parquet(tmp_path / "all_bad.parquet", [row(text_tag="no")]))


def test_unknown_policy_is_refused(tmp_path):
    with pytest.raises(ValueError, match="on_bad_row is 'ignore'"):
        read_records(tmp_path, "train", on_bad_row="ignore")


def test_empty_video_columns_are_no_videos(tmp_path, row):
    empty = [row(videos=[], video=None), row(videos=None, video={"bytes": None, "path": None})]
    for path in (write_parquet(tmp_path / "a.parquet", empty), write_jsonl(tmp_path / "a.jsonl", [
        {**one, "images": []} for one in empty
    ])):  # fmt: skip
        assert len(read_records(path, "train")[0]) == 2


def test_chat_messages_with_a_video_are_no_prompt(tmp_path, row):
    messages = [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "what happens?"}]
    path = write_jsonl(tmp_path / "train.jsonl", [row(prompt=messages, images=[])])
    with pytest.raises(ValueError, match=r"row 0: prompt is .*'type': 'video'.* not text"):
        read_records(path, "train")


def test_untagged_rows_need_no_tags(tmp_path, row):
    rows = [row(tagged=False, text_tag=None, image_tag=None, combine_tag=None, images=[])]
    assert read_records(write_jsonl(tmp_path / "train.jsonl", rows), "train")[0][0].text_tag == ""


def test_bad_rows_file(tmp_path):
    bad = [BadRow("a.parquet", 3, 'tag is "x"'), BadRow("b", 0, "é")]
    write_bad_rows(tmp_path / "bad_rows.jsonl", bad)
    lines = (tmp_path / "bad_rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [BadRow(**json.loads(line)) for line in lines] == bad
