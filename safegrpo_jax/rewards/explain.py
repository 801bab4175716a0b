"""Explains the reward of one response: tags with their tokens, rule values, and the token that decided each.

    python -m safegrpo_jax.rewards.explain --rollouts FILE --row N [--rule_set strict | --config FILE[:arg]]
    python -m safegrpo_jax.rewards.explain --text FILE [--tokenizer FOLDER] [--labels safe,unsafe,unsafe] [...]

Owns this command. Every prefix of the response is scored as a completion of its own; a value was decided by the
first token from which on it stays what it is at the end. Rows of a rollout file bring their own tokens and labels; a
text without a tokenizer is taken one character a token, which finds the same tags. `--config` takes weights, texts,
rules and the length limit from the config of a run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import runpy
from collections.abc import Sequence

import jax
import numpy as np
from transformers import AutoTokenizer

from safegrpo_jax import config as config_lib
from safegrpo_jax.rewards import spans as reward_spans
from safegrpo_jax.rewards.automaton import build_tables, token_bytes
from safegrpo_jax.rewards.compose import (
    ANCHOR,
    LENGTH,
    RewardConfig,
    compute_rewards,
    gold_answer_numbers,
    shape_by_length,
)
from safegrpo_jax.rewards.machines import TAGS
from safegrpo_jax.types import SAFE, UNSAFE, Labels, TagSpans

_VERDICTS = ("none", "safe", "unsafe", "other")
_LABELS = {"safe": SAFE, "unsafe": UNSAFE}


def explain(
    pieces: Sequence[bytes], labels: Sequence[str], config: RewardConfig, gold_answer: str = "", max_len: int = 0
) -> str:
    """A report on one response, given as the bytes of its tokens.

    `labels` are "safe" or "unsafe" for the visual, text and combined view, or empty: then only the gate is valued, and
    the `gold_answer` of a plain question if the config lists it. `max_len`: the limit in tokens that
    `config.overlong_buffer` ends at.

    Raises:
      ValueError: no tokens, or labels that are not three of safe and unsafe.
    """
    if not pieces:
        raise ValueError("the response has no tokens; give a response of at least one")
    if labels and (len(labels) != len(TAGS) or not set(labels) <= set(_LABELS)):
        raise ValueError(f"labels are {list(labels)}; give safe or unsafe for each of {', '.join(TAGS)}")
    found, values = _score_prefixes(pieces, labels, config, gold_answer, max_len)
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
    if not labels and not gold_answer:
        lines.append("The other rules need labels (visual,text,combined).")
    return "\n".join(lines)


def _score_prefixes(
    pieces: Sequence[bytes], labels: Sequence[str], config: RewardConfig, gold_answer: str, max_len: int
) -> tuple[TagSpans, dict[str, np.ndarray]]:
    """Spans and values of all prefixes, the empty one first. The response's tokens are their own vocabulary."""
    count = len(pieces)
    tables = build_tables(config.rules(), list(pieces))
    ids = np.broadcast_to(np.arange(count, dtype=np.int32), (count + 1, count))
    mask = ids < np.arange(count + 1)[:, None]
    found = jax.jit(reward_spans.scan)(tables, ids, mask)

    def repeat(value):
        return np.full(count + 1, value)

    views = (repeat(np.int32(_LABELS[label])) for label in labels or ("safe",) * len(TAGS))
    gold = repeat(gold_answer_numbers([gold_answer], config)[0])
    truth = Labels(*views, tagged=repeat(bool(labels)), gold_answer=gold)
    rewards = compute_rewards(found, truth, config)
    if max_len:
        rewards = shape_by_length(rewards, truth, np.arange(count + 1), max_len, config)
    values = {**rewards.rules, "total": rewards.total}
    if not labels:  # of a plain question only its gold answer is graded, the gate being told anyway
        shown = [ANCHOR, LENGTH, "total"] if gold[0] else []
        values = {"gate": found.gate} | {name: values[name] for name in shown if name in values}
    return jax.tree.map(np.asarray, found), {name: np.asarray(value, np.float32) for name, value in values.items()}


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


def _read_row(path: str, number: int) -> tuple[list[bytes], tuple[str, ...], str]:
    """Token bytes, labels and gold answer of one row of a rollout file; a plain question has no labels."""
    rows = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    if not 0 <= number < len(rows):
        raise ValueError(f"{path} has rows 0..{len(rows) - 1}, not {number}; choose one with --row")
    row = json.loads(rows[number])
    if missing := {"token_texts", "labels"} - row.keys():
        raise ValueError(f"{path} row {number} lacks {', '.join(sorted(missing))}; give a rollout file of this trainer")
    labels = tuple(row["labels"][tag] for tag in TAGS if row["labels"])
    return [text.encode() for text in row["token_texts"]], labels, "" if labels else row.get("answer", "")


def _read_config(flag: str) -> tuple[RewardConfig, int]:
    """The reward and the length limit of a config file, given as FILE[:arg]."""
    path, _, argument = flag.partition(":")
    if not pathlib.Path(path).is_file():
        raise ValueError(f"--config {flag}: there is no such file; the shipped ones are in configs/")
    values = runpy.run_path(path)
    if "get_config" not in values:
        raise ValueError(f"--config {flag}: the file has no get_config; give the config of a run")
    config = config_lib.from_config_dict(values["get_config"](argument))
    return config.rewards, config.sampling.max_new_tokens


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
    parser.add_argument("--rule_set", choices=("reference", "strict"), help="instead of the config's, or the published")
    parser.add_argument("--config", help="config file of a run, FILE[:arg]; without it the published reward")
    arguments = parser.parse_args(argv)
    gold_answer = ""
    if arguments.rollouts:
        pieces, labels, gold_answer = _read_row(arguments.rollouts, arguments.row)
    else:
        pieces = _read_text(arguments.text, arguments.tokenizer)
        labels = tuple(arguments.labels.split(",")) if arguments.labels else ()
    config, max_len = _read_config(arguments.config) if arguments.config else (RewardConfig(), 0)
    if arguments.rule_set:
        config = dataclasses.replace(config, rule_set=arguments.rule_set)
    print(explain(pieces, labels, config, gold_answer, max_len))


if __name__ == "__main__":
    main()
