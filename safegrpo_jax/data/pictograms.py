"""The embedded data set: drawn scenes with requests, their tags, and step-guided demonstrations.

Owns the splits, the sampling and the demonstrations; the table of truths is `pictogram_world.py`, the drawings are
`pictogram_drawing.py`. The one idea: the unit of generalisation is the pair (object kind, action). Pairs are dealt out
once to training, validation and the compositional test; a build then takes from its pairs in fixed shares of the
table's cells, so that judging image and request apart, or always saying the same, is about a coin toss.

Everything is a function of (split, seed, index): a longer build begins with the records of a shorter one.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from safegrpo_jax.data import pictogram_world as world
from safegrpo_jax.data.pictogram_drawing import draw_pictogram
from safegrpo_jax.data.records import Record

SPLITS = ("train", "validation", "test", "compositional", "alarming_benign", "questions")
_STREAMS = (*SPLITS, "pretrain", "cold_start")  # each has random numbers of its own
_DEALING_SEED = 20  # deals the pairs to the splits; part of the world, not of a run

# How many pairs an action gives to each held-out split, by category, at most one of a cell (attribute, action).
_HELD_OUT_PAIRS = {
    "compositional": {
        "unsafe_together": 4,
        "unsafe_image_only": 3,
        "safe_together": 2,
        "unsafe_image_and_pair": 2,
        "harmful_request": 2,
    },
    "validation": {
        "unsafe_together": 2,
        "unsafe_image_only": 2,
        "safe_together": 1,
        "unsafe_image_and_pair": 1,
        "harmful_request": 1,
    },
}
_TRAIN_SHARES = {"risky": 0.75, "tame": 0.05, "harmful": 0.07, "typographic": 0.08, "alarming": 0.05}
_HELD_OUT_SHARES = {"risky": 0.86, "tame": 0.07, "harmful": 0.07}
_CATEGORY_SHARES = {  # mostly pairs whose combined tag is that of neither modality
    "unsafe_together": 0.28,
    "unsafe_image_only": 0.26,
    "safe_together": 0.20,
    "unsafe_image_and_pair": 0.13,
}
_OUTCOME_SHARES = {"safe": 0.48, "unsafe": 0.52}  # of an action that can be both; tame requests make up for the rest
_OTHER = {"safe": "unsafe", "unsafe": "safe"}
_RAKING_ROUNDS = 3
_QUESTION_SHARES = {"object": 0.60, "colour": 0.25, "attribute": 0.15}
_DESCRIPTION = "description"
_DESCRIPTION_SHARE = 0.6  # of pretraining; the rest are plain questions
_SECOND_LINES = ("", "him", "them", "it")  # under any written word, so that the word itself must be read
_NUM_TRAINED_ALARMING_REQUESTS = 2


@dataclasses.dataclass(frozen=True)
class Situation:
    """What a record shows and asks, before it is drawn. `action` names an action, or a question for plain questions."""

    kind: str
    colour: str
    action: str
    request: str
    category: str
    second_line: str = ""


@dataclasses.dataclass(frozen=True)
class FaultConfig:
    """What is wrong with the demonstrations of the cold start, as probabilities; what reinforcement has to repair.

    `or_rule_probability`: the combined verdict is "unsafe where either modality is" instead of the truth.
    `combined_flip`, `modality_flip`: a verdict is turned round, after the rule. `contradicting_answer`: the answer
    does the opposite of the combined verdict. `alarming_word`: a request that only sounds harmful is tagged unsafe.
    """

    or_rule_probability: float = 0.6
    combined_flip: float = 0.05
    modality_flip: float = 0.05
    contradicting_answer: float = 0.10
    alarming_word: float = 0.4


@functools.cache
def split_pairs(split: str) -> dict[str, tuple[tuple[str, str], ...]]:
    """The (kind, action) pairs of a split by category. `test` has those of `train`.

    A cell (attribute, action) gives at most one pair each to `compositional` and `validation` and keeps two kinds at
    least to train with, so that a held-out pair is never a rule that was never shown.

    Raises:
        ValueError: not a split with pairs.
    """
    if split not in ("train", "test", "validation", "compositional", "alarming_benign"):
        raise ValueError(f"split {split!r} has no pairs; choose one of {', '.join(SPLITS[:-1])}")
    source = "train" if split in ("test", "alarming_benign") else split
    categories = ("alarming",) if split == "alarming_benign" else tuple(_deals())
    return {category: tuple(_deals()[category][source]) for category in categories if _deals()[category][source]}


@functools.cache
def _deals() -> dict[str, dict[str, list[tuple[str, str]]]]:
    """All pairs of the world: category -> split -> pairs."""
    cells: dict[str, dict[tuple[str, str], list[str]]] = {}
    for action in world.ACTIONS.values():
        for kind in world.KINDS.values():
            if kind.attribute in action.attributes:
                by_cell = cells.setdefault(world.category(kind.name, action.name), {})
                by_cell.setdefault((kind.attribute, action.name), []).append(kind.name)
    return {category: _deal(category, by_cell) for category, by_cell in cells.items()}


def _deal(category: str, by_cell: dict[tuple[str, str], list[str]]) -> dict[str, list[tuple[str, str]]]:
    """Deals the pairs of one category to the splits, leaving two kinds of each cell to train with."""
    rng = np.random.default_rng([_DEALING_SEED, *category.encode()])
    given: collections.Counter[tuple[str, str]] = collections.Counter()
    dealt: dict[str, list[tuple[str, str]]] = {"train": [], "validation": [], "compositional": []}
    cells = list(by_cell.items())
    for i in rng.permutation(len(cells)):
        (_, action), kinds = cells[i]
        kinds = [kinds[j] for j in rng.permutation(len(kinds))]
        for name, quotas in _HELD_OUT_PAIRS.items():
            if len(kinds) > 2 and given[name, action] < quotas.get(category, 0):
                given[name, action] += 1
                dealt[name].append((kinds.pop(), action))
        dealt["train"] += [(kind, action) for kind in kinds]
    return dealt


def _pair_weights(pairs: list[tuple[str, str]], shares: dict[str, float]) -> np.ndarray:
    """How often each pair is drawn, so that no single view of a pair tells the combined tag.

    Rakes, that is rescales in turn to: every attribute as often safe as unsafe; every category at its share; every
    action at its share, and in fixed proportion safe and unsafe where it can be both. The last holds exactly, the
    others as far as a few rounds bring them; more rounds would starve pairs.
    """
    outcomes = [world.combined_tag(kind, action) for kind, action in pairs]
    attributes = [(world.KINDS[kind].attribute, outcome) for (kind, _), outcome in zip(pairs, outcomes, strict=True)]
    actions = [(action, outcome) for (_, action), outcome in zip(pairs, outcomes, strict=True)]
    categories = [world.category(kind, action) for kind, action in pairs]
    group_sizes = collections.Counter(world.ACTIONS[action].group for action in {action for _, action in pairs})
    sides = collections.Counter(action for action, _ in set(actions))
    action_shares = {}
    for action, outcome in set(actions):
        group = world.ACTIONS[action].group
        proportion = _OUTCOME_SHARES[outcome] if sides[action] == 2 else 1.0
        action_shares[action, outcome] = shares[group] / group_sizes[group] * proportion
    weights = np.full(len(pairs), 1 / len(pairs))
    for _ in range(_RAKING_ROUNDS):
        found = _sums(weights, attributes)
        even = {
            (name, tag): (total + found.get((name, _OTHER[tag]), total)) / 2 for (name, tag), total in found.items()
        }
        weights = _rescale(weights, attributes, even)
        weights = _rescale(weights, categories, _sums(weights, categories) | _CATEGORY_SHARES)
        weights = _rescale(weights, actions, action_shares)
    return weights


def _sums(weights: np.ndarray, labels: list) -> dict:
    sums: dict = collections.defaultdict(float)
    for label, weight in zip(labels, weights.tolist(), strict=True):
        sums[label] += weight
    return dict(sums)


def _rescale(weights: np.ndarray, labels: list, targets: dict) -> np.ndarray:
    sums = _sums(weights, labels)
    return weights * np.array([targets[label] / sums[label] for label in labels])


def situations(split: str, num_records: int, seed: int) -> list[Situation]:
    """What `build` draws: the pairs of the split in proportion to their weights, evenly over any stretch.

    Raises:
        ValueError: an unknown split.
    """
    if split not in _STREAMS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(_STREAMS)}")
    rng = np.random.default_rng([_STREAMS.index(split), seed])
    if split == "questions":
        return _question_situations(num_records, rng)
    if split == "pretrain":
        return _pretraining_situations(num_records, rng)
    match split:
        case "alarming_benign":
            shares = {"alarming": 1.0}
        case "compositional" | "validation":
            shares = _HELD_OUT_SHARES
        case _:
            shares = _TRAIN_SHARES
    by_category = split_pairs("train" if split == "cold_start" else split)
    pairs = [pair for dealt in by_category.values() for pair in dealt]
    made = []
    for i in _spread(_pair_weights(pairs, shares), num_records, rng):
        kind, action = pairs[i]
        requests = world.ACTIONS[action].requests
        if world.ACTIONS[action].is_alarming:
            first = _NUM_TRAINED_ALARMING_REQUESTS
            requests = requests[first:] if split == "alarming_benign" else requests[:first]
        made.append(_situation(kind, action, _pick(rng, requests), world.category(kind, action), rng))
    return made


def _question_situations(num_records: int, rng: np.random.Generator) -> list[Situation]:
    items = [(kind, question) for question in _QUESTION_SHARES for kind in world.KINDS]
    weights = np.array([_QUESTION_SHARES[question] for _, question in items])
    made = []
    for i in _spread(weights, num_records, rng):
        kind, question = items[i]
        made.append(_situation(kind, question, _pick(rng, world.QUESTIONS[question]), f"question_{question}", rng))
    return made


def _pretraining_situations(num_records: int, rng: np.random.Generator) -> list[Situation]:
    """Plain questions, most of them turned into descriptions of the picture and of a request that training has."""
    requested: dict[str, list[str]] = {}
    for pairs in split_pairs("train").values():
        for kind, action in pairs:
            requested.setdefault(kind, []).append(action)
    made = []
    for situation in _question_situations(num_records, rng):
        if rng.random() < _DESCRIPTION_SHARE:
            action = _pick(rng, tuple(requested[situation.kind]))
            request = f"{_pick(rng, world.ACTIONS[action].requests)} {world.DESCRIPTION_QUESTION}"
            situation = dataclasses.replace(situation, action=action, request=request, category=_DESCRIPTION)
        made.append(situation)
    return made


def _spread(weights: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Indices in proportion to `weights` over any stretch of the sequence: steps of the golden ratio, modulo 1."""
    golden = (5**0.5 - 1) / 2
    points = (rng.random() + golden * np.arange(count)) % 1.0
    edges = np.cumsum(weights) / np.sum(weights)
    return np.minimum(np.searchsorted(edges, points, side="right"), len(weights) - 1)


def _situation(kind: str, action: str, request: str, category: str, rng: np.random.Generator) -> Situation:
    colour = _pick(rng, world.KINDS[kind].colours)
    second_line = _pick(rng, _SECOND_LINES) if world.KINDS[kind].is_written else ""
    return Situation(kind, colour, action, request, category, second_line)


def _pick(rng: np.random.Generator, items: tuple[str, ...]) -> str:
    return items[int(rng.integers(len(items)))]


def build(split: str, num_records: int, seed: int, image_size: int = 64) -> list[Record]:
    """Draws a split. Tagged records carry no response; plain questions carry their answer as response too.

    Raises:
        ValueError: an unknown split.
    """
    return _build(split, num_records, seed, image_size)


def build_questions(num_records: int, seed: int, image_size: int = 64) -> list[Record]:
    """Pretraining: plain questions and descriptions over every kind, colour and trained pair, without any verdict."""
    return _build("pretrain", num_records, seed, image_size)


def build_demonstrations(
    split: str, num_records: int, seed: int, fault: FaultConfig | None, image_size: int = 64
) -> list[Record]:
    """Records with a step-guided response each; `fault` None gives correct ones.

    Those of "train" have its pairs with drawings of their own, so that the cold start does not show the reinforcement
    stage's images with wrong verdicts.

    Raises:
        ValueError: an unknown split, or one of plain questions.
    """
    if split not in SPLITS[:-1]:
        raise ValueError(f"split {split!r} has no demonstrations; choose one of {', '.join(SPLITS[:-1])}")
    stream = "cold_start" if split == "train" else split
    records = _build(stream, num_records, seed, image_size)
    made = []
    for record, situation in zip(records, situations(stream, num_records, seed), strict=True):
        rng = np.random.default_rng([_STREAMS.index(stream), seed, record.record_id, 1])
        made.append(dataclasses.replace(record, response=demonstration(situation, rng, fault)))
    return made


def _build(stream: str, num_records: int, seed: int, image_size: int) -> list[Record]:
    records = []
    for index, situation in enumerate(situations(stream, num_records, seed)):
        rng = np.random.default_rng([_STREAMS.index(stream), seed, index])
        image = draw_pictogram(situation.kind, situation.colour, rng, image_size, situation.second_line)
        records.append(_record(situation, image, stream, index))
    return records


def _record(situation: Situation, image: bytes, split: str, index: int) -> Record:
    kind, action = situation.kind, situation.action
    if action in world.QUESTIONS or situation.category == _DESCRIPTION:
        answer = question_answer(situation)
        visual = world.visual_tag(kind)
        return Record(
            situation.request, (image,), "safe", visual, "safe", situation.category, split, answer, False, answer, index
        )
    return Record(
        prompt=situation.request,
        images=(image,),
        text_tag=world.text_tag(action),
        image_tag=world.visual_tag(kind),
        combine_tag=world.combined_tag(kind, action),
        category=situation.category,
        split=split,
        record_id=index,
    )


def question_answer(situation: Situation) -> str:
    """The exact answer of a plain question: `a knife`, `red`, `sharp`; of a description, the first lines of a trace."""
    if situation.category == _DESCRIPTION:
        return "\n".join(_observations(situation))
    match situation.action:
        case "object":
            return world.name_with_article(situation.kind)
        case "colour":
            return situation.colour
        case "attribute":
            return world.KINDS[situation.kind].attribute
    raise ValueError(f"{situation.action!r} is not a plain question; choose one of {', '.join(world.QUESTIONS)}")


def demonstration(situation: Situation, rng: np.random.Generator, fault: FaultConfig | None = None) -> str:
    """The five steps and the answer, from after the opening `<think>` on; `fault` None gives correct ones.

    Steps name object, attribute and action right before the verdict they bear on. Faults change verdicts and the
    decision, never the names.
    """
    visual = world.visual_tag(situation.kind) == "unsafe"
    text = world.text_tag(situation.action) == "unsafe"
    combined = world.combined_tag(situation.kind, situation.action) == "unsafe"
    refuses = combined
    if fault:
        draws = rng.random(6)
        visual ^= bool(draws[0] < fault.modality_flip)
        is_alarming = world.ACTIONS[situation.action].is_alarming
        text ^= bool(draws[1] < (fault.alarming_word if is_alarming else fault.modality_flip))
        combined = (visual or text) if draws[2] < fault.or_rule_probability else combined
        combined ^= bool(draws[3] < fault.combined_flip)
        refuses = combined ^ bool(draws[4] < fault.contradicting_answer)
    return write_trace(situation, visual, text, combined, refuses)


def write_trace(situation: Situation, visual: bool, text: bool, combined: bool, refuses: bool) -> str:
    """The response with the given verdicts (True = unsafe) and decision."""
    kind, action = situation.kind, world.ACTIONS[situation.action]
    attribute = world.KINDS[kind].attribute
    caption, look, aim, both = _observations(situation)
    if refuses:
        reason = "that hurts people" if text else f"{world.definite_name(kind)} is {attribute}"
        decision, answer = "refuse", f"Sorry, I cannot: {reason}."
    else:
        decision, answer = "help", f"Sure, {action.help.format(it=world.definite_name(kind))}"
    return (
        f"{caption}\n"
        f"{look} {_tag('visual_safe', visual)}\n"
        f"{aim} {_tag('text_safe', text)}\n"
        f"{both} {_tag('combined_safe', combined)}\n"
        f"5 {decision}\n</think>\n\n<answer>{answer}</answer>"
    )


def _observations(situation: Situation) -> tuple[str, str, str, str]:
    """What is seen and asked, apart and together, without verdicts: the beginnings of the first four steps."""
    kind = situation.kind
    attribute = world.KINDS[kind].attribute
    return (
        f"1 {world.name_with_colour(kind, situation.colour)}",
        f"2 looks {attribute}",
        f"3 asks to {situation.action}",
        f"4 {situation.action} {attribute}",
    )


def _tag(name: str, is_unsafe: bool) -> str:
    return f"<{name}>{'unsafe' if is_unsafe else 'safe'}</{name}>"


def corpus() -> Iterator[str]:
    """Every text the data set can contain, for training its tokenizer."""
    for questions in world.QUESTIONS.values():
        yield from questions
    yield world.DESCRIPTION_QUESTION
    for action in world.ACTIONS.values():
        yield from (f"{request}\n\n{world.INSTRUCTION}" for request in action.requests)
    for kind in world.KINDS.values():
        yield from (kind.attribute, world.name_with_article(kind.name))
        yield from (world.name_with_colour(kind.name, colour) for colour in kind.colours)
        yield from kind.colours
        for action in world.ACTIONS.values():
            if kind.attribute in action.attributes:
                situation = Situation(kind.name, kind.colours[0], action.name, "", "")
                for verdict in (False, True):
                    yield write_trace(situation, verdict, verdict, verdict, verdict)
                yield write_trace(situation, False, False, True, True)
