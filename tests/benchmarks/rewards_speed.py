"""Scoring 2048 completions of 4096 tokens on this machine: the automata against decoding and regular expressions.

    PYTHONPATH=. python tests/benchmarks/rewards_speed.py shared/data/qwen3_tokenizer

Both sides score the same token ids in turns of one run, and must agree on every reward. The baseline is what the
published reward function does: `batch_decode` (which uses all cores), then `re` on each text; the automata run on one
host device per core, as the demo does. Completions are random words with well-formed tags and an answer at the end. Two
more batches show that the cost does not depend on what is read: the three tags repeated to the end, and one token
repeated; `re` is not run on those, on which the published gate takes minutes for a single row.
"""

import argparse
import re
import statistics
import tempfile
import time

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from transformers import AutoTokenizer

from safegrpo_jax.rewards import spans as reward_spans
from safegrpo_jax.rewards.automaton import RewardTables, build_tables, token_bytes
from safegrpo_jax.rewards.compose import RewardConfig, compute_rewards
from safegrpo_jax.rewards.machines import REFUSAL_KEYWORDS, TAGS
from safegrpo_jax.types import Labels

VOCABULARY = 151936
NUM_DEVICES = 2
FLAGS = re.DOTALL | re.IGNORECASE
TAG = {tag: re.compile(rf"<{tag}_safe>(safe|unsafe)</{tag}_safe>", FLAGS) for tag in TAGS}
GATE = re.compile(
    ".*?" + ".*?".join(pattern.pattern for pattern in TAG.values()) + r".*?</think>\s*<answer>.*?</answer>", FLAGS
)
ANSWER = re.compile(r"<answer>(.*?)</answer>", FLAGS)


def published_reward(text: str, labels: tuple[str, str, str]) -> float:
    """The reward of a decoded completion. Source: the published reward function of SafeGRPO (arXiv 2511.12982)."""
    if not GATE.fullmatch(text.strip()):
        return 0.0
    right = []
    for tag, label in zip(TAGS, labels, strict=True):
        match = TAG[tag].search(text)
        right.append(bool(match) and match.group(1).lower() == label)
    if not right[2]:
        return 0.0
    answer = ANSWER.search(text).group(1).lower()
    refusal = any(keyword in answer for keyword in REFUSAL_KEYWORDS)
    return 0.5 * (0.5 + 0.25 * right[0] + 0.25 * right[1]) + 0.5 * (refusal == (labels[2] == "unsafe"))


def make_completions(tokenizer, num_rows: int, num_tokens: int) -> np.ndarray:
    """Random words, then tags and answer, to exactly `num_tokens` tokens a row."""
    rng = np.random.default_rng(0)
    words = np.array([token for token in tokenizer.get_vocab().values() if tokenizer.decode([token])[1:].isalpha()])
    endings = [
        tokenizer.encode(
            f".\n<visual_safe>{visual}</visual_safe> <text_safe>safe</text_safe> <combined_safe>{combined}"
            f"</combined_safe>\n</think>\n<answer>{answer}</answer>",
            add_special_tokens=False,
        )
        for visual in ("safe", "unsafe")
        for combined in ("safe", "unsafe")
        for answer in ("I'm sorry, I can't help with that.", "Put it into the oven for half an hour.")
    ]
    ids = rng.choice(words, (num_rows, num_tokens)).astype(np.int32)
    for row in range(num_rows):
        ending = endings[row % len(endings)]
        ids[row, num_tokens - len(ending) :] = ending
    return ids


def seconds(function, *arguments) -> tuple[float, object]:
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tokenizer")
    parser.add_argument("--rollouts", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    pieces = token_bytes(tokenizer, VOCABULARY)
    with tempfile.TemporaryDirectory() as cache:
        print(f"build {seconds(build_tables, 'reference', pieces, cache)[0]:.2f} s", end=", ")
        loads = [seconds(build_tables, "reference", pieces, cache) for _ in range(arguments.turns)]
    tables = loads[0][1]
    size = sum(getattr(tables, name).nbytes for name in RewardTables.__dataclass_fields__)
    print(f"from cache {statistics.median(load[0] for load in loads):.3f} s, {size / 2**20:.3f} MiB on device")

    mesh = jax.make_mesh((NUM_DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    shape = (arguments.rollouts, arguments.tokens)
    truth = np.random.default_rng(1).integers(0, 2, (shape[0], 3)).astype(np.int32)
    labels = Labels(truth[:, 0], truth[:, 1], truth[:, 2], tagged=np.ones(shape[0], bool))
    names = [tuple(("safe", "unsafe")[value] for value in row) for row in truth.tolist()]
    tables, labels = jax.device_put(tables, whole), jax.device_put(labels, rows)
    mask = jax.device_put(np.ones(shape, bool), rows)

    @jax.jit
    def score(tables, ids, mask, labels):
        return compute_rewards(reward_spans.scan(tables, ids, mask), labels, RewardConfig()).total

    def automata(ids):
        return np.asarray(score(tables, ids, mask, labels))

    def regular_expressions(ids):
        texts = tokenizer.batch_decode(ids.tolist(), skip_special_tokens=True)
        return np.array([published_reward(text, label) for text, label in zip(texts, names, strict=True)])

    ordinary = make_completions(tokenizer, *shape)
    block = tokenizer.encode("<visual_safe>safe</visual_safe><text_safe>safe</text_safe>", add_special_tokens=False)
    batches = {
        "ordinary": ordinary,
        "tags repeated": np.broadcast_to(np.resize(np.int32(block), shape[1]), shape),
        "token repeated": np.full(shape, ordinary[0, 0]),
    }
    on_device = {name: jax.device_put(ids, rows) for name, ids in batches.items()}
    times = {name: [] for name in ("decode + re", *batches)}
    automata(on_device["ordinary"])  # compiles
    for _ in range(arguments.turns):
        taken, expected = seconds(regular_expressions, ordinary)
        times["decode + re"].append(taken)
        for name, ids in on_device.items():
            taken, totals = seconds(automata, ids)
            times[name].append(taken)
            if name == "ordinary":
                np.testing.assert_array_equal(totals, expected)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        print(f"{name:15s} median {medians[name]:6.3f} s  of {', '.join(f'{value:.3f}' for value in values)}")
    print(f"speed-up {medians['decode + re'] / medians['ordinary']:.1f} x (ratio of medians)")


if __name__ == "__main__":
    main()
