"""Greedy sampling against transformers' `generate`, token for token: images of several sizes, padding, text only."""

import jax
import numpy as np
import pytest
from qwen_tiny import END, IMAGE, START, VIDEO, example_prompts, tiny_config, torch_inputs, torch_model

from safegrpo_jax.models import hf_weights
from safegrpo_jax.programs import model_functions
from safegrpo_jax.rewards.automaton import build_tables
from safegrpo_jax.sampling.rollout import Placement, Sampler, SamplingConfig
from safegrpo_jax.sharding import make_mesh

torch = pytest.importorskip("torch")

NEW_TOKENS, PAD = 24, 0
BANNED = (IMAGE, VIDEO, START, END)
GRIDS = {
    "small": [[(4, 6), (2, 4)], [(6, 2)]],
    "odd": [[(10, 14), (8, 8)], [(2, 10)]],
}


def greedy(params, config, prompts, stop_ids, **sizes):
    """Our completions [3 c] and their lengths, one greedy sample a prompt."""
    sampler = Sampler(
        model_functions(config),
        SamplingConfig(group_size=1, max_new_tokens=NEW_TOKENS, temperature=0.0, **sizes),
        Placement(make_mesh({"data": 1}, jax.devices()[:1]), ("data",)),
        np.isin(np.arange(config.text.vocab_size), BANNED),
        stop_ids,
        build_tables("reference", [b"%d" % token for token in range(config.text.vocab_size)]),
    )
    rollouts, _ = sampler.generate(params, prompts, jax.random.key(0))
    return np.asarray(rollouts.completion_ids), np.asarray(rollouts.completion_len)


@pytest.mark.parametrize("family,grids", [("qwen3_vl", "small"), ("qwen3_vl_moe", "small"), ("qwen2_5_vl", "odd")])
def test_greedy_equals_generate(tmp_path, family, grids):
    config = tiny_config(family)
    model = torch_model(config)
    model.save_pretrained(tmp_path / "model")
    params = hf_weights.load(tmp_path / "model", config)
    prompts = example_prompts(GRIDS[grids])

    def theirs(**stop):
        with torch.no_grad():
            inputs = torch_inputs(prompts, GRIDS[grids])
            tokens = model.generate(
                **inputs, do_sample=False, max_new_tokens=NEW_TOKENS, suppress_tokens=list(BANNED), pad_token_id=PAD,
                **stop,
            )  # fmt: skip
        return tokens[:, prompts.prompt_ids.shape[1] :].numpy()

    expected = theirs(eos_token_id=None)
    ids, lens = greedy(params, config, prompts, ())
    np.testing.assert_array_equal(ids, expected)
    assert (lens == NEW_TOKENS).all() and len(set(expected.reshape(-1))) > 5, (
        "a model that repeats itself shows nothing"
    )

    stop = int(expected[0, NEW_TOKENS // 2])  # ends one row at least, and refills its slot
    stopped = theirs(eos_token_id=stop)
    ids, lens = greedy(params, config, prompts, (stop,), num_slots=1, num_prefixes=1)
    np.testing.assert_array_equal(ids[:, : stopped.shape[1]], stopped)
    assert lens[0] <= NEW_TOKENS // 2 + 1
