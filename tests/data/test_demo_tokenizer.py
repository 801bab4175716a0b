"""The embedded tokenizer: reproducible, concatenative, one token a word, and readable by transformers."""

import json
import unicodedata

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from safegrpo_jax.data import demo_tokenizer, pictograms
from safegrpo_jax.data.pictogram_world import INSTRUCTION

LONGEST_RESPONSE = 64  # tokens, the end token included: the completion bucket of the demo
FOREIGN_TEXT = "Où est l'été? It's 12 №5 \U0001f600\n\n\tcafe\u0301 <visual_safe>unsafe</visual_safe></think>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return demo_tokenizer.build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_the_same_corpus_gives_the_same_files(folder, tmp_path):
    again = demo_tokenizer.build_tokenizer(tmp_path / "again")
    for path in sorted(folder.iterdir()):
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_ids_are_in_qwens_order(tokenizer):
    tokens = [*demo_tokenizer.CONTROL_TOKENS, *demo_tokenizer.VISIBLE_TOKENS]
    assert tokenizer.convert_tokens_to_ids(tokens) == list(range(len(tokenizer) - len(tokens), len(tokenizer)))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert 700 <= len(tokenizer) <= 1100
    assert tokenizer.decode(tokenizer.encode("a<|im_end|></think>"), skip_special_tokens=True) == "a</think>"


def test_every_word_of_the_corpus_is_one_token(folder):
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in pictograms.corpus():
        for piece in text.split("</think>"):
            words = backend.pre_tokenizer.pre_tokenize_str(piece)
            assert backend.encode(piece).tokens == [word for word, _ in words]


def test_any_text_survives(tokenizer):
    ids = tokenizer.encode(FOREIGN_TEXT)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", FOREIGN_TEXT)


def test_decoding_is_concatenation_of_bytes(tokenizer):
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    to_byte = {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
    num_words = tokenizer.convert_tokens_to_ids(demo_tokenizer.CONTROL_TOKENS[0])
    tokens = [bytes(to_byte[c] for c in token) for token in tokenizer.convert_ids_to_tokens(range(num_words))]
    assert {bytes([byte]) for byte in range(256)} <= set(tokens)
    for ids in np.random.default_rng(0).integers(num_words, size=(50, 20)).tolist():
        assert tokenizer.decode(ids) == b"".join(tokens[i] for i in ids).decode("utf-8", "replace")


def test_demonstrations_are_short_and_verdicts_are_one_token(tokenizer):
    records = pictograms.build_demonstrations("train", 200, 0, pictograms.FaultConfig(), image_size=16)
    lengths = [len(tokenizer.encode(record.response)) + 1 for record in records]
    assert 45 <= np.mean(lengths) <= 60 and max(lengths) <= LONGEST_RESPONSE
    verdicts = [token for token in tokenizer.tokenize(records[0].response) if token in (">safe", ">unsafe")]
    assert len(verdicts) == 3


def test_chat_template(tokenizer):
    parts = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    turn = (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is this?<|im_end|>\n<|im_start|>assistant\n"
    )

    def render(**options):
        messages = [{"role": "user", "content": parts}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)

    assert render() == render(enable_thinking=True) == turn + "<think>\n"
    assert render(enable_thinking=False) == turn
    plain = tokenizer.apply_chat_template([{"role": "user", "content": "Hi."}], tokenize=False)
    assert plain == "<|im_start|>user\nHi.<|im_end|>\n"


def test_loads_beside_a_qwen_config_alike(folder, tokenizer, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl"}))
    beside = AutoTokenizer.from_pretrained(tmp_path)
    assert beside.encode(FOREIGN_TEXT) == tokenizer.encode(FOREIGN_TEXT)
    assert (beside.eos_token_id, beside.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_extra_texts_become_words(tmp_path):
    folder = demo_tokenizer.build_tokenizer(tmp_path, ["Contemplate thoroughly."])
    assert AutoTokenizer.from_pretrained(folder).tokenize("Contemplate thoroughly.") == [
        "Contemplate",
        "Ġthoroughly",
        ".",
    ]
    assert "Contemplate" not in INSTRUCTION
