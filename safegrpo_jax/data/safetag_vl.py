"""SafeTag-style rows as a TFDS data set in ArrayRecord files, written and read without TensorFlow.

Owns the feature schema and the folder layout `<folder>/safetag_vl/<version>/`. Knows rows, not records: `records.py`
validates what it reads here exactly as it does parquet rows. Images are opaque encoded bytes, so nothing is decoded or
re-encoded on the way. Reading never follows class names found in the folder: the schema is the one below.

Source: tensorflow/datasets, `GeneratorBasedBuilder` and `as_data_source`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

TEXT_FIELDS = (
    "prompt",
    "text_tag",
    "image_tag",
    "combine_tag",
    "category",
    "split",
    "response",
    "answer",
)


class SafetagVl(tfds.core.GeneratorBasedBuilder):
    """Image-text prompts with safety tags (SafeTag-VL-3K columns and the optional ones of `records.Record`)."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded; the inherited look-up needs a package that tfds does not declare

    def __init__(self, rows_by_split: Mapping[str, list[dict[str, Any]]] | None = None, **builder_arguments: Any):
        self._rows_by_split = rows_by_split or {}
        super().__init__(**builder_arguments)

    def _info(self) -> tfds.core.DatasetInfo:
        features: dict[str, Any] = {name: tfds.features.Text() for name in TEXT_FIELDS}
        features["images"] = tfds.features.Sequence(tfds.features.Tensor(shape=(), dtype=np.object_))
        features["tagged"] = np.bool_
        # shuffling is off so that the order, and with it every record id, survives the round trip
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in self._rows_by_split}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(self._rows_by_split[split])


def is_dataset_folder(folder: pathlib.Path) -> bool:
    """True where `folder` is the data set's root or its version folder."""
    return _find_root(folder) is not None


def write(records_by_split: Mapping[str, Iterable[Any]], folder: str | pathlib.Path) -> pathlib.Path:
    """Writes `records.Record`s, returns the version folder. Record ids are not stored: they are the row numbers.

    Raises:
      ValueError: an empty split, or a data set that is already there.
    """
    rows = {
        split: [_row(dataclasses.asdict(record)) for record in records] for split, records in records_by_split.items()
    }
    for split, split_rows in rows.items():
        if not split_rows:
            raise ValueError(f"split {split!r} has no records; leave it out of the data set")
    tfds.disable_progress_bar()
    builder = SafetagVl(rows, data_dir=str(folder), file_format="array_record")
    if pathlib.Path(builder.data_dir).exists():
        raise ValueError(f"{builder.data_dir} already exists; delete it or choose another folder")
    # the download folder stays empty, and the messages about it would mislead: nothing is downloaded
    with tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(download_dir=downloads)
    return pathlib.Path(builder.data_dir)


def read(folder: str | pathlib.Path, split: str) -> Iterator[dict[str, Any]]:
    """Rows of a split in the order written: text fields as str, `images` as a list of bytes, `tagged` as bool.

    Raises:
      ValueError: no data set of this kind in `folder`, or no such split.
    """
    root = _find_root(pathlib.Path(folder))
    if root is None:
        raise ValueError(f"{folder} holds no safetag_vl data set in ArrayRecord format")
    builder = SafetagVl(data_dir=str(root), file_format="array_record")
    if split not in builder.info.splits:
        raise ValueError(f"{folder} has no split {split!r}; it has {', '.join(sorted(builder.info.splits))}")
    for row in builder.as_data_source(split):
        texts = {name: row[name].decode("utf-8") for name in TEXT_FIELDS}
        yield {**texts, "images": [bytes(image) for image in row["images"]], "tagged": bool(row["tagged"])}


def _row(fields: dict[str, Any]) -> dict[str, Any]:
    row = {name: fields[name] for name in TEXT_FIELDS}
    return {**row, "images": list(fields["images"]), "tagged": fields["tagged"]}


def _find_root(folder: pathlib.Path) -> pathlib.Path | None:
    version = str(SafetagVl.VERSION)
    for root in (folder, folder.absolute().parent.parent):
        path = root / "safetag_vl" / version
        if (path / "dataset_info.json").is_file() and (root == folder or path == folder.absolute()):
            return root
    return None
