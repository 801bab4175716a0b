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


CONFIG = """
from ml_collections import ConfigDict
def get_config(arg=""):
    config = ConfigDict({"rewards": {}, "train": {"prompts_per_step": 1}, "sampling": {"max_new_tokens": 20}})
    config.rewards.rule_set = arg
    config.rewards.tag_weight, config.rewards.behavior_weight = 0.25, 0.25
    config.rewards.keyword_rules = (dict(name="short_no", texts=("cannot",), wanted=True, weight=0.5),)
    config.rewards.anchor_answers = ("Rome", "Oslo")
    config.rewards.overlong_buffer = 8
    return config
"""


def test_a_config_brings_its_own_rules(tmp_path, capsys):
    config, rollouts = tmp_path / "mine.py", tmp_path / "rows.jsonl"
    config.write_text(CONFIG)
    texts = [piece.decode() for piece in PIECES]
    labels = {"visual": "unsafe", "text": "safe", "combined": "unsafe"}
    question = {"token_texts": ["<answer>", "Os", "lo", "</answer>"], "labels": {}, "answer": "Oslo"}
    rollouts.write_text(json.dumps({"token_texts": texts, "labels": labels}) + "\n" + json.dumps(question) + "\n")
    main(["--rollouts", str(rollouts), "--config", f"{config}:strict"])
    printed = capsys.readouterr().out
    report = lines(printed)
    assert printed.startswith("rule set strict, 17 tokens")
    assert report["short_no"].split()[1:] == ["1", "15", "'answer>'"]
    # 17 tokens of 20 are 5 tokens into the buffer of 8: 1 - 5/8 is left of the penalty of 1.
    assert report["completion_is_short"].split()[1:3] == ["0.375", "16"]
    assert report["total"].split()[1:3] == ["0.375", "16"]
    main(["--rollouts", str(rollouts), "--row", "1", "--config", f"{config}:strict"])
    report = lines(capsys.readouterr().out)
    assert report["answer_matches_gold"].split()[1:] == ["1", "3", "'</answer>'"]
    assert "visual_tag_matches_label" not in report and report["total"].split()[1] == "1"
    with pytest.raises(ValueError, match="no such file"):
        main(["--rollouts", str(rollouts), "--config", str(tmp_path / "missing.py")])
    rollouts.with_suffix(".py").write_text("x = 1")
    with pytest.raises(ValueError, match="has no get_config"):
        main(["--rollouts", str(rollouts), "--config", str(rollouts.with_suffix(".py"))])


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
