"""Seconds to compile the reward scan of 2048 x 4096 tokens ahead of time for slices of 16 TPU chips.

    pip install libtpu
    PYTHONPATH=.:tests/rewards python tests/benchmarks/rewards_tpu_compile.py shared/data/qwen3_tokenizer

No TPU is needed, and nothing runs on one: the figure is the compiler's time on this machine.
"""

import os
import sys
import time

import test_tpu_compile as target
from transformers import AutoTokenizer

from safegrpo_jax.rewards.automaton import build_tables, token_bytes

VOCABULARY = 151936


def main(tokenizer_folder: str) -> None:
    os.environ |= target.ENVIRONMENT
    pieces = token_bytes(AutoTokenizer.from_pretrained(tokenizer_folder), VOCABULARY)
    for rule_set in ("reference", "strict"):
        tables = build_tables(rule_set, pieces)
        for generation in target.TOPOLOGIES:
            start = time.perf_counter()
            lowered = target.lower_scan(generation, tables)
            middle = time.perf_counter()
            compiled = lowered.compile()
            end = time.perf_counter()
            found = [name for name in target.COLLECTIVES if name in compiled.as_text()]
            size = compiled.memory_analysis().argument_size_in_bytes
            print(
                f"{rule_set:10s} {generation:4s} lower {middle - start:5.1f} s  compile {end - middle:5.1f} s  "
                f"arguments {size / 1e6:.1f} MB a chip  collectives: {', '.join(found) or 'none'}"
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
