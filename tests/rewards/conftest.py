"""The real tokenizer (where its folder is present) and a small one whose merges cross every marker."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from safegrpo_jax.data import demo_tokenizer
from safegrpo_jax.rewards.automaton import token_bytes

QWEN_FOLDER = Path(__file__).parents[3] / "shared" / "data" / "qwen3_tokenizer"
QWEN_VOCABULARY = 151936


def train_small_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without word splitting, so that single tokens hold marker ends, and even whole tags."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    lines = [
        f"{before}<{tag}_safe>{verdict}</{tag}_safe>{after}"
        for before in ("", ". ", "it is ", "<answer></", "</")
        for tag in ("visual", "text", "combined")
        for verdict in ("safe", "unsafe")
        for after in ("", ".</think>\n<answer>", "</answer>", "\n<think>", "><")
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<|pad|>", "<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_tokens(["</think>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")


@pytest.fixture(scope="session")
def small_tokenizer():
    return train_small_tokenizer()


@pytest.fixture(scope="session")
def small_bytes(small_tokenizer):
    return token_bytes(small_tokenizer, len(small_tokenizer) + 3)


@pytest.fixture(scope="session")
def demo_tokens(tmp_path_factory):
    """The tokenizer of the embedded model."""
    return AutoTokenizer.from_pretrained(demo_tokenizer.build_tokenizer(tmp_path_factory.mktemp("demo_tokenizer")))


@pytest.fixture(scope="session")
def demo_bytes(demo_tokens):
    return token_bytes(demo_tokens, len(demo_tokens))


@pytest.fixture(scope="session")
def qwen_tokenizer():
    if not QWEN_FOLDER.exists():
        pytest.skip("the Qwen3 tokenizer folder is not present")
    return AutoTokenizer.from_pretrained(QWEN_FOLDER)


@pytest.fixture(scope="session")
def qwen_bytes(qwen_tokenizer):
    return token_bytes(qwen_tokenizer, QWEN_VOCABULARY)
