"""Reward rules and one tokenizer, composed into per-token transition tables.

Owns `token_bytes` (what each token id adds to the decoded text) and `build_tables` (what each token does to
each machine), with a cache on disk; `spans` runs the tables, `machines` defines the rules. Token patterns
cannot be exact because tokenizers fuse `>` with what follows it; running the byte machines over the bytes of
every token once, ahead of time, is exact for any segmentation. Tokens that act alike share a class, which
leaves a few hundred columns of some hundred thousand.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
import zipfile

import numpy as np
from absl import logging
from jaxtyping import Int32, UInt8, UInt16
from transformers import PreTrainedTokenizerBase

from safegrpo_jax.rewards import machines, patterns
from safegrpo_jax.rewards.machines import RuleSet, build_machines, default_rule_set
from safegrpo_jax.types import Array, pytree

# A table entry: next state in the low bits, what happened inside the token (the event) in the six high bits.
STATE_BITS = (machines.MAX_STATES - 1).bit_length()
STATE_MASK = (1 << STATE_BITS) - 1
MAX_TAGS_PER_TOKEN = 3
GATE, FIRST_TAG, ANSWER = 0, 1, 4  # machine numbers
_CHECK_LENGTH = 64  # tokens per decoded chunk in the concatenation check
_CHUNK = 1024  # transitions composed at once: bounds the build's memory to a few MB


@pytree
class RewardTables:
    """One rule set compiled for one tokenizer; under 1 MB.

    `transitions[first_row[k] + state, token_class[token]]` moves machine k; machines are ordered as `build_machines`
    gives them, gate, visual, text, combined, answer and the added ones, and start in state 0. The low STATE_BITS are
    the next state, the bits above the event:
      gate: how many `<` the token holds, at most 2 (the same in every row).
      tag: bits 0-1 verdict of the first tag that ends in this token (VERDICT_NONE if none does), bits 2-3 how many
        `<` of this token come before that end (at most 2), bits 4-5 how many tags end in this token.
      answer: bits 0-1 opening marker ends in this token (0 no, 1 yes and its `<` was in an earlier token, 2 yes and its
        `<` is in this token), bits 2-3 the same for the closing marker.
      added machines: none.
    Class 0 changes nothing (tokens without bytes). `outcome` is the label of each row.
    """

    token_class: UInt16[Array, "v"]
    transitions: UInt16[Array, "rows classes"]
    first_row: Int32[Array, "machines"]
    outcome: UInt8[Array, "rows"]


def token_bytes(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[bytes]:
    """The bytes each token id adds to the decoded text, for ids 0..vocab_size-1.

    Special tokens (those that `skip_special_tokens` removes) and ids without a token give b"".

    Raises:
      ValueError: the tokenizer has ids past `vocab_size`, or decoding is not the concatenation of token bytes.
    """
    added = tokenizer.added_tokens_decoder
    byte_of = {char: byte for byte, char in enumerate(_byte_level_alphabet())}
    table = [b""] * vocab_size
    for text, token_id in tokenizer.get_vocab().items():
        if token_id >= vocab_size:
            raise ValueError(f"tokenizer has id {token_id} ({text!r}) but vocab_size is {vocab_size}; use the model's")
        if token_id in added and added[token_id].special:
            continue
        if all(char in byte_of for char in text):
            table[token_id] = bytes(byte_of[char] for char in text)
        else:  # an added token, stored as plain text
            table[token_id] = text.encode()
    _check_concatenation(tokenizer, table)
    return table


def _byte_level_alphabet() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte. Source: openai/gpt-2 encoder.py."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _check_concatenation(tokenizer: PreTrainedTokenizerBase, table: list[bytes]) -> None:
    """Decodes every token once, in shuffled company, so that pairs and broken characters are seen too."""
    known = np.array(sorted(tokenizer.get_vocab().values()))
    shuffled = np.random.default_rng(0).permutation(known)
    chunks = [shuffled[start : start + _CHECK_LENGTH].tolist() for start in range(0, len(shuffled), _CHECK_LENGTH)]
    for ids in chunks:
        if (culprit := _misplaced(tokenizer, table, ids)) is not None:
            raise ValueError(
                f"decoding is not the concatenation of token bytes (first seen near id {culprit}); use a byte-level "
                "tokenizer with clean_up_tokenization_spaces=False"
            )


def _misplaced(tokenizer: PreTrainedTokenizerBase, table: list[bytes], ids: list[int]) -> int | None:
    """An id to blame if `ids` do not decode to their bytes: one that fails alone, else the first."""

    def agrees(chunk: list[int]) -> bool:
        text = b"".join(table[token_id] for token_id in chunk).decode("utf-8", errors="replace")
        return tokenizer.decode(chunk, skip_special_tokens=True) == text

    if agrees(ids):
        return None
    return next((token_id for token_id in ids if not agrees([token_id])), ids[0])


def build_tables(
    rule_set: str | RuleSet, token_bytes: list[bytes], cache_dir: str | os.PathLike | None = None
) -> RewardTables:
    """Compiles a rule set (or the default one of that name) for a tokenizer given by its token bytes.

    With `cache_dir` the tables are kept there under a hash of the rules, the token bytes and this code; a file
    that cannot be read is rebuilt, with a warning.

    Raises:
      ValueError: unknown rule set, or rules too large for the tables (names texts and limit).
    """
    rules = default_rule_set(rule_set) if isinstance(rule_set, str) else rule_set
    if cache_dir is None:
        return _compose(build_machines(rules), token_bytes)
    path = pathlib.Path(cache_dir) / f"reward_tables_{_digest(rules, token_bytes)}.npz"
    if path.exists():
        try:
            with np.load(path) as stored:
                return RewardTables(**{name: stored[name] for name in RewardTables.__dataclass_fields__})
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            logging.warning("reward table cache %s cannot be read (%s); rebuilding it", path, error)
    tables = _compose(build_machines(rules), token_bytes)
    _write_atomically(path, tables)
    return tables


def _digest(rules: RuleSet, token_bytes: list[bytes]) -> str:
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(rules)).encode())
    for module in (__file__, machines.__file__, patterns.__file__):
        digest.update(pathlib.Path(module).read_bytes())
    digest.update(np.array([len(token) for token in token_bytes], np.int64).tobytes())
    digest.update(b"".join(token_bytes))
    return digest.hexdigest()[:32]


def _write_atomically(path: pathlib.Path, tables: RewardTables) -> None:
    """Renames a finished file into place, so that no other process ever reads half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **{name: getattr(tables, name) for name in RewardTables.__dataclass_fields__})
        os.replace(temporary, path)
    finally:
        pathlib.Path(temporary).unlink(missing_ok=True)


def _compose(dfas: tuple[patterns.Dfa, ...], token_bytes: list[bytes]) -> RewardTables:
    """Runs all tokens byte by byte in step, once per distinct (action so far, next byte)."""
    sizes = [len(dfa.label) for dfa in dfas]
    identity = np.concatenate([np.arange(size) for size in sizes]).astype(np.uint16)
    actions = [identity]  # every distinct action of a token prefix
    number_of_action = {identity.tobytes(): 0}

    lengths = np.array([len(token) for token in token_bytes])
    starts = np.cumsum(lengths) - lengths
    text = np.frombuffer(b"".join(token_bytes), np.uint8)
    current = np.zeros(len(token_bytes), np.int64)
    for depth in range(lengths.max(initial=0)):
        alive = np.flatnonzero(lengths > depth)
        pairs = current[alive] * 256 + text[starts[alive] + depth]
        unique_pairs, inverse = np.unique(pairs, return_inverse=True)
        numbers = np.empty(len(unique_pairs), np.int64)
        for chunk in range(0, len(unique_pairs), _CHUNK):
            block = unique_pairs[chunk : chunk + _CHUNK]
            before = np.stack([actions[number] for number in block // 256])
            for row, action in enumerate(_append_byte(dfas, before, block % 256), chunk):
                number = number_of_action.setdefault(action.tobytes(), len(actions))
                if number == len(actions):
                    actions.append(action)
                numbers[row] = number
        current[alive] = numbers[inverse]

    used, token_class = np.unique(np.concatenate([[0], current]), return_inverse=True)  # 0 keeps the identity first
    if len(used) > np.iinfo(np.uint16).max:
        raise ValueError(f"{len(used)} token classes, over {np.iinfo(np.uint16).max}; use fewer texts")
    return RewardTables(
        token_class=token_class[1:].astype(np.uint16),
        transitions=np.ascontiguousarray(np.stack([actions[number] for number in used], axis=1)),
        first_row=(np.cumsum(sizes) - sizes).astype(np.int32),
        outcome=np.concatenate([dfa.label for dfa in dfas]).astype(np.uint8),
    )


def _append_byte(dfas: tuple[patterns.Dfa, ...], actions: np.ndarray, byte: np.ndarray) -> np.ndarray:
    """The actions [a, rows] followed by one byte [a] each; `RewardTables` documents the entries."""
    opens = (byte == ord("<"))[:, None]
    seen = actions[:, :1] >> STATE_BITS  # `<` so far, from the gate's events
    seen_now = np.minimum(seen + opens, 2)
    columns, start = [], 0
    for number, dfa in enumerate(dfas):
        packed = actions[:, start : start + len(dfa.label)]
        state, event = packed & STATE_MASK, packed >> STATE_BITS
        target = dfa.next_state[state, byte[:, None]]
        if number == GATE:
            event = np.broadcast_to(seen_now, event.shape)
        elif number < ANSWER:
            event = _tag_event(event, dfa.label[target], seen)
        elif number == ANSWER:
            event = _answer_event(event, dfa.label[state], dfa.label[target], seen)
        columns.append(target | (event << STATE_BITS))
        start += len(dfa.label)
    return np.concatenate(columns, axis=1).astype(np.uint16)


def _tag_event(event: np.ndarray, verdict: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """A tag ends where `verdict` is not 0: keeps the first verdict of the token and counts the tags."""
    ended = verdict > 0
    count = (event >> 4) + ended
    if count.max() > MAX_TAGS_PER_TOKEN:
        raise ValueError(f"one token holds more than {MAX_TAGS_PER_TOKEN} whole tags; use another tokenizer")
    first = np.where(event & 3, event & 15, np.where(ended, verdict | (seen << 2), 0))
    return first | (count << 4)


def _answer_event(event: np.ndarray, before: np.ndarray, after: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Notes the opening and the closing marker where the machine changes its label."""
    where = np.where(seen > 0, 2, 1)
    opened = (before == machines.ANSWER_NONE) & (after == machines.ANSWER_OPEN)
    closed = (before == machines.ANSWER_OPEN) & (after > machines.ANSWER_OPEN)
    return event | np.where(opened, where, 0) | np.where(closed, where << 2, 0)
