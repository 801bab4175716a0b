"""Metrics of hand-made rows, intervals against known values and coverage, the before/after table."""

import dataclasses

import numpy as np
import pytest

from safegrpo_jax.evaluation.scores import (
    answer_matches,
    before_after_markdown,
    before_after_table,
    bootstrap_mean_interval,
    difference_interval,
    score_split,
    wilson_interval,
)
from safegrpo_jax.types import (
    SAFE,
    UNSAFE,
    VERDICT_NONE,
    VERDICT_OTHER,
    VERDICT_SAFE,
    VERDICT_UNSAFE,
    Labels,
    TagSpans,
)


def make_spans(verdicts, gate, refusal):
    verdicts = np.array(verdicts, np.int32)
    zeros = np.zeros(len(verdicts), np.int32)
    return TagSpans(
        gate=np.array(gate, bool),
        verdict=verdicts,
        tag_start=np.zeros_like(verdicts),
        tag_end=np.zeros_like(verdicts),
        tag_count=np.zeros_like(verdicts),
        answer_start=zeros,
        answer_end=zeros,
        answered=zeros == 0,
        refusal=np.array(refusal, bool),
        answer_len=zeros,
        added_outcomes=np.zeros((len(verdicts), 0), np.int32),
    )


def tagged_case():
    spans = make_spans(
        [
            [VERDICT_SAFE, VERDICT_UNSAFE, VERDICT_UNSAFE],
            [VERDICT_SAFE, VERDICT_NONE, VERDICT_OTHER],
            [VERDICT_UNSAFE, VERDICT_SAFE, VERDICT_SAFE],
            [VERDICT_NONE, VERDICT_UNSAFE, VERDICT_UNSAFE],
        ],
        gate=[1, 0, 1, 1],
        refusal=[1, 0, 0, 0],
    )
    labels = Labels(
        visual=np.array([SAFE, SAFE, SAFE, SAFE], np.int32),
        text=np.array([UNSAFE, SAFE, SAFE, UNSAFE], np.int32),
        combined=np.array([UNSAFE, UNSAFE, SAFE, SAFE], np.int32),
        tagged=np.ones(4, bool),
    )
    return spans, labels, np.array([1.0, 0.0, 0.875, 0.25], np.float32)


def test_tagged_rows_get_every_metric_but_the_answer():
    scores = score_split(*tagged_case(), [""] * 4, [""] * 4)
    assert {name: score["value"] for name, score in scores.items()} == {
        "visual_accuracy": 0.5,
        "text_accuracy": 0.75,
        "combined_accuracy": 0.5,
        "refusal_rate": 0.25,
        "format_rate": 0.75,
        "mean_reward": 0.53125,
    }
    assert {score["count"] for score in scores.values()} == {4}
    for score in scores.values():
        assert 0 <= score["low"] < score["value"] < score["high"] <= 1


def test_plain_questions_get_the_answer_alone_and_mixed_rows_do_not_mingle():
    spans, labels, rewards = tagged_case()
    mixed = dataclasses.replace(labels, tagged=np.array([True, False, False, True]))
    scores = score_split(spans, mixed, rewards, ["", " A cat.\n", "a dog", ""], ["", "a cat", "a cat", ""])
    assert scores["answer_accuracy"]["value"] == 0.5 and scores["answer_accuracy"]["count"] == 2
    assert scores["mean_reward"]["value"] == 0.625 and scores["mean_reward"]["count"] == 2
    assert scores["combined_accuracy"]["value"] == 0.5

    plain = dataclasses.replace(labels, tagged=np.zeros(4, bool))
    assert list(score_split(spans, plain, rewards, ["x"] * 4, ["x"] * 4)) == ["answer_accuracy"]


def test_impossible_rows_are_refused():
    spans, labels, rewards = tagged_case()
    with pytest.raises(ValueError, match="'texts': 3"):
        score_split(spans, labels, rewards, [""] * 3, [""] * 4)
    with pytest.raises(ValueError, match="row 2 is a plain question without a gold answer"):
        questions = dataclasses.replace(labels, tagged=np.array([True, True, False, True]))
        score_split(spans, questions, rewards, [""] * 4, [""] * 4)


@pytest.mark.parametrize(
    "text,gold,match",
    [
        ("Red", "red", True),
        (" red. \n", "Red", True),
        ("red .", "red", True),
        ("red", "red.", True),
        ("red..", "red", False),
        ("dark red", "red", False),
        ("", "red", False),
    ],
)
def test_exact_answers(text, gold, match):
    assert answer_matches(text, gold) is match


@pytest.mark.parametrize(
    "successes,count,low,high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_matches_published_values(successes, count, low, high):
    """The four worked examples of Newcombe 1998 (two-sided, part 1, table I), printed to four digits."""
    np.testing.assert_allclose(wilson_interval(successes, count), (low, high), atol=5e-5)
    mirrored = wilson_interval(count - successes, count)
    np.testing.assert_allclose(mirrored, (1 - high, 1 - low), atol=5e-5)


def test_wilson_interval_refuses_impossible_counts():
    for successes, count in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match=f"got {successes} of {count}"):
            wilson_interval(successes, count)


def test_bootstrap_interval_is_the_normal_one_for_many_values():
    values = np.random.default_rng(0).choice([0, 0.25, 0.5, 1.0], 600)
    low, high = bootstrap_mean_interval(values, seed=1)
    half = 1.96 * values.std() / np.sqrt(600)
    # 2000 resamples place a 2.5% quantile within about 4% of the half width.
    np.testing.assert_allclose([low, high], [values.mean() - half, values.mean() + half], atol=0.1 * half)
    assert bootstrap_mean_interval(values, seed=1) == (low, high)
    assert bootstrap_mean_interval(np.full(5, 0.5), seed=1) == (0.5, 0.5)
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_mean_interval(np.zeros(0), seed=1)


def rate(successes, count):
    low, high = wilson_interval(successes, count)
    return {"value": successes / count, "count": count, "low": low, "high": high}


def test_difference_interval_matches_published_values():
    """Newcombe 1998 (part 2, table II, method 10): 56/70 - 48/80 and 10/10 - 0/10."""
    np.testing.assert_allclose(difference_interval(rate(48, 80), rate(56, 70)), (0.0524, 0.3339), atol=5e-5)
    np.testing.assert_allclose(difference_interval(rate(0, 10), rate(10, 10)), (0.6075, 1.0), atol=5e-5)


def evaluations():
    before = {
        "test": {"combined_accuracy": rate(58, 100), "mean_reward": rate(50, 100) | {"low": 0.45, "high": 0.55}},
        "questions": {"answer_accuracy": rate(19, 20)},
    }
    after = {
        "test": {"combined_accuracy": rate(72, 100), "mean_reward": rate(70, 100) | {"low": 0.65, "high": 0.75}},
        "questions": {"answer_accuracy": rate(18, 20)},
    }
    return before, after


def test_table_shows_values_change_and_interval():
    lines = before_after_table(*evaluations()).splitlines()
    assert lines[0].split()[:6] == ["split", "metric", "rows", "before", "after", "change"]
    assert lines[2].split() == "test combined_accuracy 100 58.0 % 72.0 % +14.0 +0.8 to +26.6".split()
    assert lines[3].split() == "test mean_reward 100 0.500 0.700 +0.200 +0.129 to +0.271".split()
    assert lines[4].split()[:8] == "questions answer_accuracy 20 95.0 % 90.0 % -5.0".split()
    assert len({len(line) for line in lines}) == 1, "columns are aligned"


def test_markdown_holds_the_same_cells():
    plain, markdown = before_after_table(*evaluations()), before_after_markdown(*evaluations())
    rows = [line for line in markdown.splitlines() if "---" not in line]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [" ".join(row).split() for row in cells] == [
        line.split() for line in plain.splitlines() if not line.startswith("---")
    ]
    assert {row.count("|") for row in markdown.splitlines()} == {8}


def test_table_refuses_evaluations_of_different_rows():
    before, after = evaluations()
    after["questions"]["answer_accuracy"]["count"] = 21
    with pytest.raises(ValueError, match="questions/answer_accuracy was scored on 20 rows before and 21 after"):
        before_after_table(before, after)
    with pytest.raises(ValueError, match="questions/answer_accuracy was scored on 20 rows before and None after"):
        before_after_markdown(before, {"test": before["test"]})
