"""The SafeTag record: its schema, and reading it from parquet, JSONL or ArrayRecord with every row checked.

Owns `Record` and the validation of rows; images are checked by images.py and stay encoded. Does not tokenize or batch.
The one idea: each format yields plain rows `{column: value}`, and one function turns a row into a Record or says what
is wrong with it, so that all formats fail alike, naming file and row (rows count from 0).

Columns are those of SafeTag-VL-3K (`prompt, images, text_tag, image_tag, combine_tag`); optional are `category, split,
response, tagged, answer`. A `split` column, where filled, selects the rows of a file. Rows with videos are refused.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging

from safegrpo_jax.data import safetag_vl
from safegrpo_jax.data.images import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, check_image

TAGS = ("safe", "unsafe")
IMAGE_MARK = "<image>"  # in a prompt: the place of an image; a prompt without marks has its images first
VIDEO_MARK = "<video>"  # the place of a video in data sets that have them; refused
TAG_COLUMNS = ("text_tag", "image_tag", "combine_tag")
REQUIRED_COLUMNS = ("prompt", "images", *TAG_COLUMNS)
OPTIONAL_COLUMNS = ("category", "split", "response", "tagged", "answer")
VIDEO_COLUMNS = ("video", "videos")  # read only to refuse rows that fill them

_READ_ROWS = 64  # rows of parquet in memory at a time, besides the records kept


@dataclasses.dataclass(frozen=True)
class Record:
    """One example. Images stay encoded. Tags are "safe" or "unsafe".

    `response`: a demonstration to imitate, "" where there is none. `tagged` False: a plain question, graded by
    `answer` (its exact gold answer) and whose tags mean nothing. `record_id`: row number in its data set and split,
    bad rows counted, so that skipping them renumbers nothing.
    """

    prompt: str
    images: tuple[bytes, ...]
    text_tag: str
    image_tag: str
    combine_tag: str
    category: str = ""
    split: str = ""
    response: str = ""
    tagged: bool = True
    answer: str = ""
    record_id: int = 0


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A refused row: file, row number from 0, and the reason with its remedy."""

    file: str
    row: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}: {self.reason}"


def read_records(
    path: str | pathlib.Path,
    split: str,
    on_bad_row: str = "raise",
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    max_image_bytes: int = MAX_IMAGE_BYTES,
) -> tuple[list[Record], list[BadRow]]:
    """Reads one split of a .parquet or .jsonl file, of a folder with such files, or of a `safetag_vl` folder.

    In a folder (or its `data` subfolder) the files of a split are `<split>.parquet`, `<split>-*.parquet`, or .jsonl
    alike. Each image is decoded once to check it and dropped again; records hold the encoded bytes.
    `on_bad_row`: "raise", or "skip" to get bad rows as the second list; a bad file is never skipped.

    Raises:
      ValueError: missing path, unreadable file, missing column, no usable row, or the first bad row.
    """
    if on_bad_row not in ("raise", "skip"):
        raise ValueError(f'data.on_bad_row is {on_bad_row!r}; use "raise" or "skip"')
    records: list[Record] = []
    bad_rows: list[BadRow] = []
    for record_id, (file, row_number, row) in enumerate(_rows(pathlib.Path(path), split)):
        try:
            records.append(_to_record(row, file, split, record_id, max_image_pixels, max_image_bytes))
        except ValueError as error:
            bad = BadRow(str(file), row_number, str(error))
            if on_bad_row == "raise":
                raise ValueError(f'{bad} (or set data.on_bad_row="skip")') from None
            bad_rows.append(bad)
    if not records:
        raise ValueError(
            f"{path}: split {split!r} has no usable rows ({len(bad_rows)} bad); check data.path and the split's name"
        )
    if bad_rows:
        num_rows = len(records) + len(bad_rows)
        logging.warning("%s: skipped %d bad rows of %d, first: %s", path, len(bad_rows), num_rows, bad_rows[0])
    return records, bad_rows


def write_bad_rows(path: str | pathlib.Path, bad_rows: list[BadRow]) -> None:
    """Writes one JSON object `{"file", "row", "reason"}` per line."""
    lines = [json.dumps(dataclasses.asdict(bad), ensure_ascii=False) + "\n" for bad in bad_rows]
    pathlib.Path(path).write_text("".join(lines), encoding="utf-8")


def _belongs_elsewhere(row: Any, split: str) -> bool:
    named = row.get("split") if isinstance(row, dict) else None
    return isinstance(named, str) and named not in ("", split)


def _rows(path: pathlib.Path, split: str) -> Iterator[tuple[pathlib.Path, int, Any]]:
    """(file, row number, row) for every row; a row that is no mapping is left for `_to_record` to refuse."""
    if not path.exists():
        raise ValueError(f"data path {path} does not exist; set data.path to a .parquet or .jsonl file or their folder")
    if path.is_dir() and safetag_vl.is_dataset_folder(path):
        for number, row in enumerate(safetag_vl.read(path, split)):
            yield path, number, row
        return
    for file in _files(path, split):
        rows = _parquet_rows(file) if file.suffix == ".parquet" else _jsonl_rows(file)
        yield from ((file, number, row) for number, row in rows if not _belongs_elsewhere(row, split))


def _files(path: pathlib.Path, split: str) -> list[pathlib.Path]:
    if path.is_file():
        if path.suffix not in (".parquet", ".jsonl"):
            raise ValueError(f"{path}: unknown file type {path.suffix!r}; use .parquet or .jsonl")
        return [path]
    for folder in (path, path / "data"):
        for suffix in (".parquet", ".jsonl"):
            pattern = re.compile(rf"{re.escape(split)}(-.*)?{re.escape(suffix)}")
            files = sorted(file for file in folder.glob(f"*{suffix}") if pattern.fullmatch(file.name))
            if files:
                return files
    raise ValueError(f"{path} has no {split}*.parquet or {split}*.jsonl; check data.path and the name of the split")


def _parquet_rows(file: pathlib.Path) -> Iterator[tuple[int, Any]]:
    try:
        with pq.ParquetFile(file) as parquet:
            present = parquet.schema_arrow.names
            for name in REQUIRED_COLUMNS:
                if name not in present:
                    raise ValueError(f"{file} has no column {name!r}; it has {', '.join(present)}")
            columns = [name for name in (*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS, *VIDEO_COLUMNS) if name in present]
            number = 0
            for batch in parquet.iter_batches(batch_size=_READ_ROWS, columns=columns):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a readable parquet file: {' '.join(str(error).split())[:200]}") from None


def _jsonl_rows(file: pathlib.Path) -> Iterator[tuple[int, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:  # also bytes that are not UTF-8
                row = None
            yield number, row


def _to_record(
    row: Any, file: pathlib.Path, split: str, record_id: int, max_image_pixels: int, max_image_bytes: int
) -> Record:
    """Raises ValueError with the reason alone; the caller adds file and row."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object on one line; remove or repair the line")
    for name in REQUIRED_COLUMNS:
        if name not in row:
            raise ValueError(f"has no field {name!r}; add it")
    tagged = True if row.get("tagged") is None else row["tagged"]
    if not isinstance(tagged, bool):
        raise ValueError(f"tagged is {tagged!r}; use true or false")
    may_be_empty = OPTIONAL_COLUMNS if tagged else OPTIONAL_COLUMNS + TAG_COLUMNS
    texts = {name: _text(row.get(name), name, name in may_be_empty) for name in safetag_vl.TEXT_FIELDS}
    for name in TAG_COLUMNS:
        if tagged and texts[name] not in TAGS:
            raise ValueError(f"{name} is {texts[name]!r}; it must be one of {', '.join(TAGS)}")
    _refuse_videos(row, texts["prompt"])
    images = _images(row["images"], file.parent, max_image_bytes)
    for index, image in enumerate(images):
        try:
            check_image(image, max_image_pixels, max_image_bytes)
        except ValueError as error:
            raise ValueError(f"image {index}: {error}") from None
    marks = texts["prompt"].count(IMAGE_MARK)
    if marks not in (0, len(images)):
        raise ValueError(f"prompt has {marks} {IMAGE_MARK} marks for {len(images)} images; make them equal")
    if not images and not texts["prompt"].strip():
        raise ValueError("prompt is empty and there is no image; remove the row")
    texts["split"] = texts["split"] or split
    return Record(**texts, images=images, tagged=tagged, record_id=record_id)


def _refuse_videos(row: dict[str, Any], prompt: str) -> None:
    for name in VIDEO_COLUMNS:
        value = row.get(name)
        if any(value.values()) if isinstance(value, dict) else value:
            raise ValueError(
                f"{name} is filled: videos are not supported; give still frames in images, or remove the row"
            )
    if VIDEO_MARK in prompt:
        raise ValueError(
            f"prompt has a {VIDEO_MARK} mark: videos are not supported; give still frames, or remove the row"
        )


def _text(value: Any, name: str, may_be_empty: bool) -> str:
    if value is None and may_be_empty:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {str(value)[:40]!r}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds a lone surrogate, which is not Unicode text; remove it") from None
    return value


def _images(value: Any, folder: pathlib.Path, max_image_bytes: int) -> tuple[bytes, ...]:
    """Accepts bytes, `{"bytes", "path"}` as Hugging Face writes it, `{"base64"}`, or a file name beside the data."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ValueError("images is not a list; write one image as a list of one")
    images = []
    for item in value:
        if isinstance(item, dict) and isinstance(item.get("bytes"), bytes):
            item = item["bytes"]
        elif isinstance(item, dict) and isinstance(item.get("base64"), str):
            item = _from_base64(item["base64"])
        elif isinstance(item, dict):
            item = item.get("path")
        if isinstance(item, str):
            item = _read_beside(item, folder, max_image_bytes)
        if not isinstance(item, bytes):
            raise ValueError(f"image {len(images)} is neither bytes, nor base64, nor a file name")
        images.append(item)
    return tuple(images)


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise ValueError("image is not valid base64; encode it again") from None


def _read_beside(name: str, folder: pathlib.Path, max_image_bytes: int) -> bytes:
    """A data set may name files in its own folder only: rows come from strangers, and nothing is fetched."""
    if "://" in name or name.startswith("data:"):
        raise ValueError(f"image {name[:80]!r} is a URL; download it beside the data and give its file name")
    try:
        root = folder.resolve()
        file = (root / name).resolve()
        found = file.is_file()
    except (OSError, RuntimeError, ValueError):  # too long, a loop of links, a null byte
        raise ValueError(f"image {name[:80]!r} is not a usable file name") from None
    if pathlib.PurePath(name).is_absolute() or not file.is_relative_to(root):
        raise ValueError(f"image {name[:80]!r} lies outside {folder}; give a file name relative to it")
    if not found:
        raise ValueError(f"image file {name[:80]!r} does not exist in {folder}")
    if file.stat().st_size > max_image_bytes:
        raise ValueError(f"image file {name[:80]!r} exceeds max_image_bytes={max_image_bytes}; re-encode it")
    return file.read_bytes()
