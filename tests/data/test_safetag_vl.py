"""ArrayRecord round trip without TensorFlow."""

import dataclasses
import subprocess
import sys

import pytest

from safegrpo_jax.data import safetag_vl
from safegrpo_jax.data.records import Record, read_records


@pytest.fixture
def records(png):
    return [
        Record(
            prompt=f"what is thís? {index} <|im_end|>\n",
            images=tuple(png(8, 8 + index, seed) for seed in range(index % 3)),
            text_tag="safe",
            image_tag="unsafe",
            combine_tag="safe",
            category="a",
            split="test",
            response="<think>\n" if index else "",
            tagged=index != 3,
            answer="a knife",
            record_id=index,
        )
        for index in range(12)
    ]


def test_round_trip_keeps_bytes_and_order(tmp_path, records):
    version_folder = safetag_vl.write({"test": records, "train": records[:1]}, tmp_path)
    assert read_records(tmp_path, "test") == (records, [])
    assert read_records(version_folder, "test") == (records, [])
    assert read_records(tmp_path, "train")[0] == [records[0]]
    assert next(safetag_vl.read(tmp_path, "test"))["prompt"] == records[0].prompt
    assert sorted(path.name for path in tmp_path.iterdir()) == ["safetag_vl"]


def test_tensorflow_is_never_imported(tmp_path, records):
    folder = safetag_vl.write({"test": records}, tmp_path)
    script = (
        "import sys; from safegrpo_jax.data import records; "
        f"assert len(records.read_records({str(folder)!r}, 'test')[0]) == 12; "
        "assert 'tensorflow' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert "tensorflow" not in sys.modules


def test_rows_are_validated_like_any_other(tmp_path, records):
    bad = [records[0], dataclasses.replace(records[1], combine_tag="harmful")]
    safetag_vl.write({"test": bad}, tmp_path)
    with pytest.raises(ValueError, match="row 1: combine_tag is 'harmful'"):
        read_records(tmp_path, "test")


def test_refusals(tmp_path, records):
    with pytest.raises(ValueError, match="split 'train' has no records"):
        safetag_vl.write({"train": []}, tmp_path)
    with pytest.raises(ValueError, match="holds no safetag_vl"):
        next(safetag_vl.read(tmp_path, "test"))
    safetag_vl.write({"test": records}, tmp_path)
    with pytest.raises(ValueError, match="already exists"):
        safetag_vl.write({"test": records}, tmp_path)
    with pytest.raises(ValueError, match="no split 'dev'; it has test"):
        read_records(tmp_path, "dev")
