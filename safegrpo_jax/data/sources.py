"""Which records a run reads: the embedded pictograms, written once as ArrayRecord and read back, or files of the user.

Every source ends in the same thing, lists of `Record` by split name, through the same reader.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from safegrpo_jax.data import pictograms, safetag_vl
from safegrpo_jax.data.records import BadRow, Record, read_records


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which records, and what to do with bad ones.

    `path`: parquet, JSONL or ArrayRecord (see `data/records.py`), or "" for the embedded pictograms. Fields from
    `image_size` on describe the embedded data set and are unused otherwise: its size, and the cold start's fault
    (`pictograms.FaultConfig`), where `question_share` of the records are plain questions.
    """

    path: str = ""
    on_bad_row: str = "raise"
    max_image_pixels: int = 16_777_216
    max_image_bytes: int = 20_000_000
    image_size: int = 64
    num_pretrain: int = 12_000
    num_cold_start: int = 4_000
    question_share: float = 0.2
    num_train: int = 4_000
    num_evaluation: int = 480
    or_rule_probability: float = 0.6
    combined_flip: float = 0.05
    modality_flip: float = 0.05
    contradicting_answer: float = 0.10
    alarming_word: float = 0.4


def load_splits(
    config: DataConfig, splits: Sequence[str], seed: int, workdir: Path
) -> tuple[dict[str, list[Record]], list[BadRow]]:
    """Records of every named split, and the rows left out with `on_bad_row` "skip".

    The embedded data set is built into `workdir/data` on first use.

    Raises:
      ValueError: a bad row, a missing or empty split; names file and row.
    """
    path = config.path or _embedded(config, splits, seed, workdir / "data")
    records, bad_rows = {}, []
    for split in splits:
        records[split], bad = read_records(
            path,
            split,
            on_bad_row=config.on_bad_row,
            max_image_pixels=config.max_image_pixels,
            max_image_bytes=config.max_image_bytes,
        )
        bad_rows += bad
    return records, bad_rows


def _embedded(config: DataConfig, splits: Sequence[str], seed: int, folder: Path) -> Path:
    if not folder.exists():
        # Under another name first: a killed build must not pass for a data set.
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        safetag_vl.write(build_embedded(config, splits, seed), partial)
        partial.rename(folder)
    return folder


def build_embedded(config: DataConfig, splits: Sequence[str], seed: int) -> dict[str, list[Record]]:
    """Draws the embedded data set: the named splits, deterministic in `seed`."""
    fault = pictograms.FaultConfig(
        or_rule_probability=config.or_rule_probability,
        combined_flip=config.combined_flip,
        modality_flip=config.modality_flip,
        contradicting_answer=config.contradicting_answer,
        alarming_word=config.alarming_word,
    )
    built = {}
    for split in splits:
        match split:
            case "pretrain":
                built[split] = pictograms.build_questions(config.num_pretrain, seed, config.image_size)
            case "cold_start":
                num_questions = round(config.num_cold_start * config.question_share)
                built[split] = [
                    *pictograms.build_demonstrations(
                        "train", config.num_cold_start - num_questions, seed, fault, config.image_size
                    ),
                    # Without questions among them the demonstrations make the model forget how to answer plainly.
                    *pictograms.build_questions(num_questions, seed + 1, config.image_size),
                ]
            case "train":
                built[split] = pictograms.build(split, config.num_train, seed, config.image_size)
            case _:
                built[split] = pictograms.build(split, config.num_evaluation, seed, config.image_size)
    return built
