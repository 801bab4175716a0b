"""What the reward state adds to a decode step of a text decoder of 13 million parameters, on this machine.

    PYTHONPATH=. python tests/benchmarks/rewards_decode_step.py shared/data/qwen3_tokenizer

Times loops of the decoder's step (hidden state, logits over the vocabulary, argmax) and of the reward's `step`, for the
same number of rollouts, in turns of one run; the share is the ratio of their medians. The reward state runs on the
tables of the tokenizer given, which do not grow with the model, whereas a decode step does.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from transformers import AutoTokenizer

from safegrpo_jax.models import qwen_vl
from safegrpo_jax.models.decoder import TextConfig
from safegrpo_jax.models.vision import VisionConfig
from safegrpo_jax.rewards import spans as reward_spans
from safegrpo_jax.rewards.automaton import build_tables, token_bytes
from safegrpo_jax.types import CacheView, KVCache

VOCABULARY = 151936
MODEL_VOCABULARY = 2048
GROUP = 8
PROMPT_TOKENS = 48
TEXT = TextConfig(
    vocab_size=MODEL_VOCABULARY,
    width=384,
    mlp_width=1024,
    num_layers=8,
    num_heads=6,
    num_kv_heads=2,
    head_dim=64,
    rope_theta=10_000.0,
    mrope_section=(12, 10, 10),
    tied_embeddings=True,
)
VISION = VisionConfig(width=16, mlp_width=16, num_layers=1, num_heads=1, out_width=384, deepstack_layers=(0,))


def decode_loop(model: qwen_vl.QwenVLConfig, num_steps: int):
    """`num_steps` greedy decode steps from private column 0 on."""

    def run(params, cache, last_ids):
        seats = jnp.arange(len(last_ids), dtype=jnp.int32)[None]

        def step(column, carry):
            last_ids, cache = carry
            positions = jnp.full_like(last_ids, PROMPT_TOKENS + column)
            view = CacheView(column, jnp.full_like(last_ids, column + 1), seats, seats)
            hidden, cache = qwen_vl.decode_hidden(params, last_ids, positions, view, cache, model)
            return jnp.argmax(qwen_vl.logits_from_hidden(params, hidden, model), -1).astype(jnp.int32), cache

        return jax.lax.fori_loop(0, num_steps, step, (last_ids, cache))[0]

    return jax.jit(run)


def time_once(function, arguments, times: list[float]) -> None:
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    times.append(time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tokenizer")
    parser.add_argument("--rollouts", type=int, nargs="+", default=[8, 64, 192])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--turns", type=int, default=7)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    pieces = token_bytes(AutoTokenizer.from_pretrained(arguments.tokenizer), VOCABULARY)
    tables = jax.device_put(build_tables("reference", pieces))
    model = qwen_vl.QwenVLConfig(VISION, TEXT, *range(4))  # the ids of the vision tokens do not matter here
    params = qwen_vl.init_params(model, jax.random.key(0))
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(params['text'])) / 1e6:.1f} M parameters in the text decoder")
    loop = decode_loop(model, arguments.steps)
    reward = jax.jit(reward_spans.advance)
    for num_rows in arguments.rollouts:
        k, e, b = TEXT.num_kv_heads, TEXT.head_dim, num_rows // GROUP
        shapes = ((b, k, e, PROMPT_TOKENS), (b, k, PROMPT_TOKENS, e))
        prefix = ((jnp.ones(shape),) * TEXT.num_layers for shape in shapes)
        prompt_mask = jnp.ones((b, PROMPT_TOKENS), bool)
        shapes = ((num_rows, k, e, arguments.steps), (num_rows, k, arguments.steps, e))
        private = ((jnp.zeros(shape),) * TEXT.num_layers for shape in shapes)
        cache = KVCache(*prefix, prompt_mask, *private)
        decode_arguments = (params, cache, jnp.zeros(num_rows, jnp.int32))
        ids = np.random.default_rng(0).integers(0, VOCABULARY, (num_rows, arguments.steps)).astype(np.int32)
        state = reward_spans.init_state(tables, num_rows)
        reward_arguments = (tables, state, jnp.asarray(ids), jnp.ones(ids.shape, bool))
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(arguments.turns + 1):
            time_once(loop, decode_arguments, times[0])
            time_once(reward, reward_arguments, times[1])
        decode, step = (1e3 * statistics.median(values[1:]) / arguments.steps for values in times)  # the first compiles
        print(
            f"{num_rows:4d} rollouts: decode step {decode:7.3f} ms, reward step {step:6.4f} ms, "
            f"share {100 * step / decode:.2f}%"
        )


if __name__ == "__main__":
    main()
