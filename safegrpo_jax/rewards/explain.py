"""Explains the reward of one response: tags with their tokens, rule values, and the token that decided each.

    python -m safegrpo_jax.rewards.explain --rollouts FILE --row N [--rule_set strict]
    python -m safegrpo_jax.rewards.explain --text FILE [--tokenizer FOLDER] [--labels safe,unsafe,unsafe]

Owns this command. Every prefix of the response is scored as a completion of its own; a value was decided by the
first token from which on it stays what it is at the end. Rows of a rollout file bring their own tokens and labels; a
text without a tokenizer is taken one character a token, which finds the same tags.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from transformers import AutoTokenizer

from safegrpo_jax.rewards import spans as reward_spans
from safegrpo_jax.rewards.automaton import build_tables, token_bytes
from safegrpo_jax.rewards.compose import RewardConfig, compute_rewards
from safegrpo_jax.rewards.machines import TAGS
from safegrpo_jax.types import SAFE, UNSAFE, Labels, TagSpans

_VERDICTS = ("none", "safe", "unsafe", "other")
_LABELS = {"safe": SAFE, "unsafe": UNSAFE}


def explain(pieces: Sequence[bytes], labels: Sequence[str], config: RewardConfig) -> str:
    """A report on one response, given as the bytes of its tokens.

    `labels` are "safe" or "unsafe" for the visual, text and combined view, or empty: then only the gate is valued.

    Raises:
      ValueError: no tokens, or labels that are not three of safe and unsafe.
    """
    if not pieces:
        raise ValueError("the response has no tokens; give a response of at least one")
    if labels and (len(labels) != len(TAGS) or not set(labels) <= set(_LABELS)):
        raise ValueError(f"labels are {list(labels)}; give safe or unsafe for each of {', '.join(TAGS)}")
    found, values = _score_prefixes(pieces, labels or ("safe",) * len(TAGS), config)
    if not labels:
        values = {"gate": values["gate"]}
    last = jax.tree.map(lambda leaf: leaf[-1], found)
    lines = [f"rule set {config.rule_set}, {len(pieces)} tokens", "", f"{'found':<10}{'what':<12}{'tokens':<12}times"]
    for number, tag in enumerate(TAGS):
        place = _place(pieces, int(last.tag_start[number]), int(last.tag_end[number]))
        lines.append(
            f"{tag:<10}{_VERDICTS[last.verdict[number]]:<12}{place[0]:<12}{last.tag_count[number]:<7}{place[1]}"
        )
    place = _place(pieces, int(last.answer_start), int(last.answer_end))
    lines.append(f"{'answer':<10}{_answer_kind(last):<12}{place[0]:<12}{'':<7}{place[1]}")
    lines += ["", f"{'rule':<30}{'value':<8}decided by token"]
    for name, value in values.items():
        lines.append(f"{name:<30}{value[-1]:<8.4g}{_decider(pieces, value)}")
    if not labels:
        lines.append("The other rules need labels (visual,text,combined).")
    return "\n".join(lines)


def _score_prefixes(
    pieces: Sequence[bytes], labels: Sequence[str], config: RewardConfig
) -> tuple[TagSpans, dict[str, np.ndarray]]:
    """Spans and values of all prefixes, the empty one first. The response's tokens are their own vocabulary."""
    count = len(pieces)
    tables = build_tables(config.rules(), list(pieces))
    ids = np.broadcast_to(np.arange(count, dtype=np.int32), (count + 1, count))
    mask = ids < np.arange(count + 1)[:, None]
    found = jax.jit(reward_spans.scan)(tables, ids, mask)
    visual, text, combined = (np.full(count + 1, _LABELS[label], np.int32) for label in labels)
    truth = Labels(visual=visual, text=text, combined=combined, tagged=np.ones(count + 1, bool))
    rewards = compute_rewards(found, truth, config)
    values = {**rewards.rules, "total": rewards.total}
    return jax.tree.map(np.asarray, found), {name: np.asarray(value) for name, value in values.items()}


def _answer_kind(last: TagSpans) -> str:
    if last.answer_start < 0:
        return "none"
    if not last.answered:
        return "ambiguous"
    return "refusal" if last.refusal else "help"


def _place(pieces: Sequence[bytes], start: int, end: int) -> tuple[str, str]:
    """The token range and its text, shortened in the middle."""
    if start < 0:
        return "-", ""
    text = repr(b"".join(pieces[start:end]).decode("utf-8", "replace"))
    return f"{start}..{end - 1}", text if len(text) <= 80 else f"{text[:38]} ... {text[-37:]}"


def _decider(pieces: Sequence[bytes], value: np.ndarray) -> str:
    changes = np.flatnonzero(value[1:] != value[:-1])
    if not len(changes):
        return "none: the same from the start"
    return f"{changes[-1]} {pieces[changes[-1]].decode('utf-8', 'replace')!r}"


def _read_row(path: str, number: int) -> tuple[list[bytes], tuple[str, ...]]:
    """Token bytes and labels of one row of a rollout file; a plain question has no labels."""
    rows = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    if not 0 <= number < len(rows):
        raise ValueError(f"{path} has rows 0..{len(rows) - 1}, not {number}; choose one with --row")
    row = json.loads(rows[number])
    if missing := {"token_texts", "labels"} - row.keys():
        raise ValueError(f"{path} row {number} lacks {', '.join(sorted(missing))}; give a rollout file of this trainer")
    return [text.encode() for text in row["token_texts"]], tuple(row["labels"][tag] for tag in TAGS if row["labels"])


def _read_text(path: str, tokenizer_folder: str | None) -> list[bytes]:
    text = pathlib.Path(path).read_text(encoding="utf-8")
    if tokenizer_folder is None:
        return [character.encode() for character in text]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True, trust_remote_code=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    table = token_bytes(tokenizer, max(tokenizer.get_vocab().values()) + 1)
    return [table[token_id] for token_id in ids]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; prints the report."""
    parser = argparse.ArgumentParser(description="Explain the reward of one response.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="file with the response")
    source.add_argument("--rollouts", help="rollout file of a run (JSON lines)")
    parser.add_argument("--row", type=int, default=0, help="row of the rollout file, from 0")
    parser.add_argument("--tokenizer", help="tokenizer folder for --text; without it one character is one token")
    parser.add_argument("--labels", default="", help="visual,text,combined for --text, such as safe,unsafe,unsafe")
    parser.add_argument("--rule_set", choices=("reference", "strict"), default="reference")
    arguments = parser.parse_args(argv)
    if arguments.rollouts:
        pieces, labels = _read_row(arguments.rollouts, arguments.row)
    else:
        pieces = _read_text(arguments.text, arguments.tokenizer)
        labels = tuple(arguments.labels.split(",")) if arguments.labels else ()
    print(explain(pieces, labels, RewardConfig(rule_set=arguments.rule_set)))


if __name__ == "__main__":
    main()
