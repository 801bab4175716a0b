"""Metrics: each step once and finite, on disk at once; the progress line; rows and images for audit."""

import io
import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from safegrpo_jax.metrics import (
    ROW_KEYS,
    MetricsWriter,
    NonFiniteError,
    Progress,
    StageTimer,
    describe_spans,
    peak_rss_bytes,
    save_image,
    token_texts,
    write_evaluation,
    write_rollouts,
)
from safegrpo_jax.types import TagSpans

STAGES = ("pretrain", "grpo")


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_events(folder):
    """All events of a TensorBoard folder: records of (length u64, crc u32, payload, crc u32), oldest file first."""
    events = []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (size,) = struct.unpack_from("<Q", content, at)
            events.append(Event.FromString(content[at + 12 : at + 12 + size]))
            at += 12 + size + 4
    return events


def scalars(folder):
    return [(e.step, v.tag, round(v.simple_value, 4)) for e in read_events(folder) for v in e.summary.value]


def test_lines_are_on_disk_at_once_and_exact(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write("grpo", 1, {"reward/mean": jnp.float32(0.1), "kl": 1 / 3, "count": np.int32(4)})
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert rows == [{"stage": "grpo", "step": 1, "reward/mean": float(np.float32(0.1)), "kl": 1 / 3, "count": 4.0}]
    writer.close()
    assert (1, "kl", 0.3333) in scalars(tmp_path / "tensorboard/grpo")


def test_tensorboard_can_be_off(tmp_path):
    MetricsWriter(tmp_path, tensorboard=False).write("grpo", 1, {"kl": 0.5})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), jnp.float32("-inf")])
def test_non_finite_names_step_and_metric_and_writes_nothing(tmp_path, bad):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    with pytest.raises(NonFiniteError, match="grpo step 7: loss is "):
        writer.write("grpo", 7, {"kl": 0.0, "loss": bad})
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_no_step_appears_twice(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write("grpo", 2, {"kl": 0.5})
    for step in (1, 2):
        with pytest.raises(ValueError, match="grpo is at step 2"):
            writer.write("grpo", step, {"kl": 0.5})
    with pytest.raises(ValueError, match="grpo is at step 2"):
        MetricsWriter(tmp_path, tensorboard=False).write("grpo", 2, {"kl": 0.5})
    with pytest.raises(ValueError, match="may not be called 'step'"):
        writer.write("grpo", 3, {"step": 0.5})


def test_rewind_forgets_what_comes_after_the_checkpoint(tmp_path):
    writer = MetricsWriter(tmp_path)
    for stage, last in (("pretrain", 3), ("grpo", 4)):
        for step in range(1, last + 1):
            writer.write(stage, step, {"loss": step})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "grpo", "step": 5, "lo')  # killed while writing
    resumed = MetricsWriter(tmp_path)
    resumed.rewind(STAGES, "grpo", 2)
    resumed.write("grpo", 3, {"loss": 30})
    resumed.close()
    rows = [(row["stage"], row["step"], row["loss"]) for row in read_rows(tmp_path / "metrics.jsonl")]
    assert rows == [("pretrain", i, i) for i in (1, 2, 3)] + [("grpo", 1, 1), ("grpo", 2, 2), ("grpo", 3, 30)]
    starts = [event.step for event in read_events(tmp_path / "tensorboard/grpo") if event.HasField("session_log")]
    assert starts == [3]  # TensorBoard drops what it has from step 3 on
    assert scalars(tmp_path / "tensorboard/grpo")[-1] == (3, "loss", 30)


def test_rewind_to_an_earlier_stage_forgets_the_later_ones(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    for stage in STAGES:
        writer.write(stage, 1, {"loss": 1})
    writer.rewind(STAGES, "pretrain", 0)
    assert read_rows(tmp_path / "metrics.jsonl") == []
    writer.write("pretrain", 1, {"loss": 2})
    with pytest.raises(ValueError, match="unknown stage 'sft'"):
        writer.rewind(STAGES, "sft", 0)
    with pytest.raises(ValueError, match=r"\['pretrain'\] are not in this run"):
        writer.rewind(("grpo",), "grpo", 0)


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "grpo", "step": 1}\nnonsense\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a metrics line"):
        MetricsWriter(tmp_path)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_one_plain_line_per_step_in_a_file():
    times = iter([0.0, 100.0, 102.0, 104.0])
    stream = io.StringIO()
    progress = Progress(stream, "grpo", 60, start_step=10, clock=lambda: next(times))
    for step in (11, 12, 60):
        progress.update(step, {"reward": 0.53218, "KL": 0.00123}, num_tokens=3000)
    progress.note("saved")
    progress.close()
    assert stream.getvalue().splitlines() == [
        "grpo 11/60  reward 0.5322  KL 0.00123  30 tok/s  ETA 1h21m",  # 49 more like the first, 100 s each
        "grpo 12/60  reward 0.5322  KL 0.00123  1,500 tok/s  ETA 1m36s",  # 48 more like the second, 2 s each
        "grpo 60/60  reward 0.5322  KL 0.00123  1,500 tok/s",
        "saved",
    ]


def test_progress_rewrites_one_line_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    times = iter([0.0, 1.0, 2.0])
    stream = Terminal()
    progress = Progress(stream, "grpo", 2, clock=lambda: next(times))
    progress.update(1, {"reward": 0.5})
    progress.update(2, {"reward": 0.75, "a long label": 1})
    progress.close()
    assert stream.getvalue() == "\r\x1b[Kgrpo 1/2  reward 0.\r\x1b[Kgrpo 2/2  reward 0.\n"


def test_timer_adds_parts_and_starts_again():
    times = iter([0.0, 1.5, 2.0, 4.0, 5.0, 6.0, 7.0, 7.25])
    timer = StageTimer(clock=lambda: next(times))
    for part in ("generate", "update", "generate"):
        with timer(part):
            pass
    assert timer.pop() == {"time/generate_seconds": 2.5, "time/update_seconds": 2.0}
    with pytest.raises(KeyError), timer("update"):
        raise KeyError
    assert timer.pop() == {"time/update_seconds": 0.25}


def test_peak_memory_is_in_bytes():
    ballast = np.ones(30_000_000, np.uint8)
    assert 50e6 < peak_rss_bytes() < 64e9 and ballast[0] == 1


def make_row(**changes):
    row = dict.fromkeys(ROW_KEYS, "") | {"record_id": 7, "labels": {}, "reward": np.float32(0.5), "text": "é\n\u2028"}
    return row | {"completion_ids": np.array([1, 2]), "advantage": None} | changes


def test_rollout_rows_round_trip(tmp_path):
    path = write_rollouts(tmp_path, 10, [make_row(), make_row(truncated=np.bool_(True))])
    assert path == tmp_path / "rollouts/step_000010.jsonl"
    first, second = read_rows(path)
    assert first == make_row() | {"reward": 0.5, "completion_ids": [1, 2]}
    assert second["truncated"] is True
    assert write_evaluation(tmp_path, "after", "test", [make_row()]) == tmp_path / "evaluation/after_test.jsonl"
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["step_000010.jsonl"]


def test_bad_rows_are_named_and_leave_the_old_file(tmp_path):
    path = write_rollouts(tmp_path, 1, [make_row()])
    before = path.read_text()
    with pytest.raises(ValueError, match=r"step_000001.jsonl row 1: missing spans"):
        write_rollouts(tmp_path, 1, [make_row(), {k: v for k, v in make_row().items() if k != "spans"}])
    with pytest.raises(ValueError, match=r"row 0 \(record 7\)"):
        write_rollouts(tmp_path, 1, [make_row(reward=float("nan"))])
    assert path.read_text() == before


def test_images_are_stored_once_by_content(tmp_path):
    png, jpeg = b"\x89PNG first", b"\xff\xd8\xff second"
    names = [save_image(tmp_path, image) for image in (png, jpeg, png)]
    assert names[0] == names[2] != names[1]
    assert names[0].endswith(".png") and names[1].endswith(".jpg")
    assert (tmp_path / "rollouts/images" / names[0]).read_bytes() == png
    assert len(list((tmp_path / "rollouts/images").iterdir())) == 2


def test_spans_are_described_by_name():
    spans = TagSpans(
        gate=np.array([True, False]),
        verdict=np.array([[1, 2, 3], [0, 1, 0]]),
        tag_start=np.array([[2, 9, 20], [-1, 4, -1]]),
        tag_end=np.array([[5, 12, 25], [-1, 8, -1]]),
        tag_count=np.array([[1, 1, 2], [0, 1, 0]]),
        answer_start=np.array([30, -1]),
        answer_end=np.array([40, -1]),
        answered=np.array([True, False]),
        refusal=np.array([True, False]),
        answer_len=np.array([8, 0]),
        added_outcomes=np.zeros((2, 0), np.int32),
    )
    assert describe_spans(spans, 0) == {
        "visual": [2, 5, "safe"],
        "text": [9, 12, "unsafe"],
        "combined": [20, 25, "other"],
        "answer": [30, 40],
    }
    assert describe_spans(spans, 1) == {"text": [4, 8, "safe"]}


def test_token_texts_join_to_the_decoded_bytes():
    pieces = [b"caf\xc3", b"\xa9", b"", b" \xff!", b"\xf0\x9f", b"\x94", b"\xa5 ", b"\xe2\x82"]
    texts = token_texts(pieces)
    assert texts == ["caf", "é", "", " \ufffd!", "", "", "\U0001f525 ", "\ufffd"]
    assert "".join(texts) == b"".join(pieces).decode(errors="replace")
    assert token_texts([]) == []
