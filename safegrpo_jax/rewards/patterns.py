"""Regular expressions over bytes, compiled to minimal deterministic automata.

Owns the combinators (literal, fold, choice, sequence, repetition), the subset construction and the
minimisation; knows nothing of reward rules or tokenizers. The one idea: characters are their UTF-8 bytes, and
matching bytes then equals matching the decoded text, invalid bytes included, because a lead byte is never part of
another character.
Source: Python `re` (IGNORECASE, `\\s`) and `str.lower` define the folds and the white space.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

# What `re.IGNORECASE` and `str.lower` treat as an ASCII letter beside its two ASCII forms.
IGNORECASE_EXTRAS = {"i": "\u0130\u0131", "k": "\u212a", "s": "\u017f"}
LOWER_EXTRAS = {"k": "\u212a"}
# `str.isspace`, which is also `\s` and what `str.strip` removes.
SPACES = (
    "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)


class Pattern(NamedTuple):
    """A regular expression. `kind` says what `parts` are: byte values for "bytes", else patterns."""

    kind: str  # bytes: one of them; sequence: all in order; choice: any one; repeat: the only one, any number of times
    parts: tuple


def one_of_bytes(values: Iterable[int]) -> Pattern:
    """Matches one byte out of `values`."""
    return Pattern("bytes", tuple(values))


def sequence(*patterns: Pattern) -> Pattern:
    """Matches the patterns one after the other."""
    return Pattern("sequence", patterns)


def choice(*patterns: Pattern) -> Pattern:
    """Matches any one of the patterns."""
    return Pattern("choice", patterns)


def repeat(pattern: Pattern) -> Pattern:
    """Matches the pattern any number of times, zero included."""
    return Pattern("repeat", (pattern,))


def optional(pattern: Pattern) -> Pattern:
    """Matches the pattern or nothing."""
    return choice(pattern, sequence())


def literal(text: str) -> Pattern:
    """Matches exactly the UTF-8 bytes of `text`."""
    return sequence(*(one_of_bytes([byte]) for byte in text.encode()))


def one_of(characters: str) -> Pattern:
    """Matches one character out of `characters`."""
    return choice(*(literal(character) for character in characters))


def fold(text: str, extras: dict[str, str]) -> Pattern:
    """Matches ASCII `text` in any case; `extras` gives further spellings of single (lower-case) characters."""
    spellings = [sorted({c.lower(), c.upper(), *extras.get(c.lower(), "")}) for c in text]
    return sequence(*(one_of("".join(options)) for options in spellings))


ANY_BYTES = repeat(one_of_bytes(range(256)))
SPACE_RUN = repeat(one_of(SPACES))


@dataclasses.dataclass(frozen=True)
class Dfa:
    """A complete deterministic automaton; state 0 is the start, label 0 means nothing matched yet.

    `next_state` is int32 [states, 256], `label` int32 [states].
    """

    next_state: np.ndarray
    label: np.ndarray


class _Nfa:
    """A nondeterministic automaton under construction; state 0 is the start."""

    def __init__(self):
        self.edges: list[list[tuple[frozenset[int], int]]] = [[]]
        self.epsilons: list[list[int]] = [[]]

    def add_state(self) -> int:
        self.edges.append([])
        self.epsilons.append([])
        return len(self.edges) - 1

    def add(self, pattern: Pattern, start: int) -> int:
        """Adds the pattern behind state `start`; returns its end state."""
        match pattern.kind:
            case "sequence":
                for part in pattern.parts:
                    start = self.add(part, start)
                return start
            case "choice":
                ends = [self.add(part, start) for part in pattern.parts]
                end = self.add_state()
                for branch_end in ends:
                    self.epsilons[branch_end].append(end)
            case "repeat":
                # A state of its own: a loop on `start` itself would leak into other branches of a choice.
                end = self.add_state()
                self.epsilons[start].append(end)
                self.epsilons[self.add(pattern.parts[0], end)].append(end)
            case "bytes":
                end = self.add_state()
                self.edges[start].append((frozenset(pattern.parts), end))
        return end


def compile_patterns(labelled: Sequence[tuple[int, Pattern]]) -> Dfa:
    """The minimal automaton that labels any bytes with the label of the first listed pattern matching them whole.

    Labels are positive. Put ANY_BYTES in front of a pattern to search instead of to match.
    """
    nfa = _Nfa()
    accepting = []
    for label, pattern in labelled:
        start = nfa.add_state()
        nfa.epsilons[0].append(start)
        accepting.append((nfa.add(pattern, start), label))
    closures = _closures(nfa)
    byte_class, moves = _moves(nfa, closures)

    index = {closures[0]: 0}
    pending = [closures[0]]
    rows, labels = [], []
    for subset in pending:  # grows while it runs
        labels.append(next((label for state, label in accepting if subset >> state & 1), 0))
        targets = [0] * len(moves)
        for state in _members(subset):
            targets = [target | move[state] for target, move in zip(targets, moves, strict=True)]
        for target in targets:
            if target not in index:
                index[target] = len(index)
                pending.append(target)
        rows.append([index[target] for target in targets])
    return minimize(Dfa(np.array(rows, np.int32)[:, byte_class], np.array(labels, np.int32)))


def _members(subset: int) -> list[int]:
    """The set bits of `subset`."""
    return [position for position, bit in enumerate(reversed(bin(subset)[2:])) if bit == "1"]


def _closures(nfa: _Nfa) -> list[int]:
    """For each state, the bit set of the states it reaches without reading a byte, itself included."""
    closures = []
    for start in range(len(nfa.edges)):
        seen, stack = {start}, [start]
        while stack:
            fresh = set(nfa.epsilons[stack.pop()]) - seen
            seen |= fresh
            stack.extend(fresh)
        closures.append(sum(1 << state for state in seen))
    return closures


def _moves(nfa: _Nfa, closures: list[int]) -> tuple[np.ndarray, list[list[int]]]:
    """Bytes that no edge tells apart share a class: (class of each byte [256], moves[class][state] = bit set)."""
    byte_sets = sorted({allowed for edges in nfa.edges for allowed, _ in edges}, key=sorted)
    membership = np.array([[byte in allowed for allowed in byte_sets] for byte in range(256)])
    _, representatives, byte_class = np.unique(membership, axis=0, return_index=True, return_inverse=True)
    moves = []
    for byte in representatives.tolist():
        move = []
        for edges in nfa.edges:
            subset = 0
            for allowed, target in edges:
                if byte in allowed:
                    subset |= closures[target]
            move.append(subset)
        moves.append(move)
    return byte_class.reshape(256), moves


def connect(stages: Sequence[tuple[Dfa, dict[int, int]]], stage_labels: Sequence[int] | None = None) -> Dfa:
    """Runs automata one after the other, starting with the first.

    A stage is (automaton, goto): as soon as the automaton reaches a state with label l, the run continues at
    the start of stage goto[l]; a label that goto lacks leads to a dead state. A stage with an empty goto is a
    last one and keeps its labels. `stage_labels` labels the unlabelled states of each stage (default 0).

    Raises:
      ValueError: a stage with a goto matches the empty string.
    """
    labels_of_stages = stage_labels or [0] * len(stages)
    offsets = np.cumsum([0] + [len(dfa.label) for dfa, _ in stages])
    dead = int(offsets[-1])
    next_states, labels = [], []
    for (dfa, goto), offset, stage_label in zip(stages, offsets[:-1], labels_of_stages, strict=True):
        if goto and dfa.label[0]:
            raise ValueError(f"a connected stage matches the empty string (label {dfa.label[0]}); require a byte in it")
        target = np.arange(len(dfa.label)) + offset
        if goto:
            hits = np.flatnonzero(dfa.label)
            target[hits] = [offsets[goto[label]] if label in goto else dead for label in dfa.label[hits].tolist()]
        next_states.append(target[dfa.next_state])
        labels.append(np.where(dfa.label == 0, stage_label, 0 if goto else dfa.label))
    next_states.append(np.full((1, 256), dead))
    labels.append(np.zeros(1, np.int32))
    return minimize(Dfa(np.concatenate(next_states).astype(np.int32), np.concatenate(labels).astype(np.int32)))


def constant(label: int) -> Dfa:
    """The automaton that bears `label` from its start on, whatever it reads."""
    return Dfa(np.zeros((1, 256), np.int32), np.array([label], np.int32))


def minimize(dfa: Dfa) -> Dfa:
    """The smallest automaton with the same labels, states numbered in breadth-first order from the start."""
    reachable = _breadth_first(dfa.next_state)
    position = np.zeros(len(dfa.label), np.int32)
    position[reachable] = np.arange(len(reachable))
    next_state, label = position[dfa.next_state[reachable]], dfa.label[reachable]
    columns = np.array(list({column.tobytes(): number for number, column in enumerate(next_state.T)}.values()))
    distinct = next_state[:, columns]  # bytes that behave alike need comparing once
    blocks = number_rows(label[:, None])
    while True:  # Moore: split blocks until successors agree
        refined = number_rows(np.column_stack([blocks, blocks[distinct]]))
        if refined.max() == blocks.max():
            break
        blocks = refined
    first = np.unique(blocks, return_index=True)[1]
    quotient, quotient_label = blocks[next_state[first]], label[first]
    order = _breadth_first(quotient, int(blocks[0]))
    rank = np.argsort(order)
    return Dfa(rank[quotient[order]].astype(np.int32), quotient_label[order].astype(np.int32))


def number_rows(rows: np.ndarray) -> np.ndarray:
    """Equal rows get equal numbers, in the order of first appearance."""
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in np.ascontiguousarray(rows)], np.int32)


def _breadth_first(next_state: np.ndarray, start: int = 0) -> np.ndarray:
    """The states reachable from `start`, in the order of discovery."""
    order = {start: None}
    pending = [start]
    for state in pending:
        for target in dict.fromkeys(next_state[state].tolist()):
            if target not in order:
                order[target] = None
                pending.append(target)
    return np.array(list(order), np.int64)
