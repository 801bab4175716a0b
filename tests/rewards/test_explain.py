"""The explanation of one response, from the library and from the command line."""

import json

import pytest

from safegrpo_jax.rewards.compose import RewardConfig
from safegrpo_jax.rewards.explain import explain, main

PIECES = [
    b"ok", b" <", b"visual_safe", b">", b"unsafe", b"</", b"visual_safe", b">.",
    b"<text_safe>safe</text_safe>", b"<combined_safe>unsafe", b"</combined_safe>\n", b"</think>", b"<answer>",
    b"I cannot.", b"</", b"answer>", b"",
]  # fmt: skip


def lines(report):
    return {line.split()[0]: line for line in report.splitlines() if line}


def test_report_names_spans_values_and_deciding_tokens():
    report = lines(explain(PIECES, ("unsafe", "unsafe", "unsafe"), RewardConfig()))
    assert report["visual"].split()[:4] == ["visual", "unsafe", "1..7", "1"]
    assert report["text"].split()[:4] == ["text", "safe", "8..8", "1"]
    assert report["answer"].split()[:3] == ["answer", "refusal", "12..15"]
    assert report["gate"].split()[1:] == ["1", "15", "'answer>'"]
    assert report["visual_tag_matches_label"].split()[1:] == ["1", "7", "'>.'"]
    assert "from the start" in report["text_tag_matches_label"]
    assert report["tag_reward"].split()[1:3] == ["0.75", "10"]
    assert report["total"].split()[1:3] == ["0.875", "15"]


def test_command_reads_rollout_rows_and_texts(tmp_path, capsys):
    row = {
        "token_texts": [piece.decode() for piece in PIECES],
        "labels": {"visual": "unsafe", "text": "safe", "combined": "unsafe"},
    }
    rollouts = tmp_path / "step_000001.jsonl"
    rollouts.write_text(json.dumps({"token_texts": ["plain"], "labels": {}}) + "\n" + json.dumps(row) + "\n")
    main(["--rollouts", str(rollouts), "--row", "1", "--rule_set", "strict"])
    assert lines(capsys.readouterr().out)["total"].split()[1] == "1"
    main(["--rollouts", str(rollouts)])
    assert "need labels" in capsys.readouterr().out

    text = tmp_path / "response.txt"
    text.write_text("".join(row["token_texts"]))
    main(["--text", str(text), "--labels", "unsafe,safe,safe"])
    report = lines(capsys.readouterr().out)
    assert report["total"].split()[1] == "0" and report["visual"].split()[2] == "3..35"


def test_bad_input_is_named(tmp_path):
    rollouts = tmp_path / "rows.jsonl"
    rollouts.write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match="rows 0..0, not 4"):
        main(["--rollouts", str(rollouts), "--row", "4"])
    with pytest.raises(ValueError, match="row 0 lacks labels, token_texts"):
        main(["--rollouts", str(rollouts)])
    with pytest.raises(ValueError, match="visual, text, combined"):
        explain([b"x"], ("safe",), RewardConfig())
    with pytest.raises(ValueError, match="no tokens"):
        explain([], (), RewardConfig())
