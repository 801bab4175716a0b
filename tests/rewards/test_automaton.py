"""Token bytes of real tokenizers, refusals that name the cause, and the cache on disk."""

import pathlib

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from safegrpo_jax.rewards.automaton import STATE_MASK, RewardTables, build_tables, token_bytes
from safegrpo_jax.rewards.machines import RuleSet, default_rule_set

FIELDS = tuple(RewardTables.__dataclass_fields__)
DEVICE_LIMIT_BYTES = 2**20


def same(first: RewardTables, second: RewardTables) -> bool:
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in FIELDS)


def test_special_and_unused_ids_have_no_bytes(small_tokenizer, small_bytes):
    assert small_bytes[small_tokenizer.pad_token_id] == small_bytes[-1] == b""
    think = small_tokenizer.convert_tokens_to_ids("</think>")
    assert small_bytes[think] == b"</think>"  # added, but visible
    assert set(map(len, small_bytes)) >= {0, 1, 2, 8}


def test_qwen_bytes(qwen_tokenizer, qwen_bytes):
    assert qwen_bytes[1784] == b"><" and qwen_bytes[366] == b" <" and qwen_bytes[151668] == b"</think>"
    assert qwen_bytes[151645] == qwen_bytes[151643] == qwen_bytes[151900] == b""
    assert sum(len(piece) == 1 for piece in qwen_bytes) == 256


def test_vocabulary_smaller_than_the_tokenizer_is_refused(small_tokenizer):
    with pytest.raises(ValueError, match="vocab_size is 100"):
        token_bytes(small_tokenizer, 100)


def test_detokenizers_that_do_not_concatenate_are_refused():
    """A word-level decoder puts spaces between tokens; clean-up removes spaces before punctuation."""
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[U]": 2}, unk_token="[U]"))
    with pytest.raises(ValueError, match="not the concatenation"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=words), 3)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate([*alphabet, "\u0120."])}
    cleaning = Tokenizer(models.BPE(vocabulary, [("\u0120", ".")]))
    cleaning.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(" .", ".")])
    with pytest.raises(ValueError, match="not the concatenation"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=cleaning), 257)


@pytest.mark.parametrize("name", ["reference", "strict"])
def test_tables_fit_on_the_device(name, qwen_bytes):
    tables = build_tables(name, qwen_bytes)
    assert sum(getattr(tables, field).nbytes for field in FIELDS) < DEVICE_LIMIT_BYTES
    own_rows = np.arange(len(tables.outcome))
    machine = np.searchsorted(tables.first_row, own_rows, side="right") - 1
    assert np.array_equal((tables.transitions[:, 0] & STATE_MASK) + tables.first_row[machine], own_rows)
    assert (tables.token_class[[151643, 151645]] == 0).all()


def test_cache_is_used_keyed_by_content_and_repaired(small_bytes, tmp_path):
    built = build_tables("reference", small_bytes)
    assert same(build_tables("reference", small_bytes, tmp_path), built)
    [path] = tmp_path.iterdir()  # no temporary file is left
    marked = {**dict(np.load(path)), "outcome": np.full_like(built.outcome, 7)}
    np.savez(path, **marked)
    assert (build_tables("reference", small_bytes, tmp_path).outcome == 7).all()  # read, not built

    for broken in (path.read_bytes()[:1000], b"", b"not a zip file"):
        path.write_bytes(broken)
        assert same(build_tables("reference", small_bytes, tmp_path), built)
        assert same(build_tables("reference", small_bytes, tmp_path), built)
    np.savez(path, outcome=built.outcome)
    assert same(build_tables("reference", small_bytes, tmp_path), built)

    build_tables("reference", [*small_bytes[:-1], b"x"], tmp_path)
    build_tables(RuleSet("reference", ("sorry",)), small_bytes, tmp_path)
    build_tables("strict", small_bytes, tmp_path)
    assert len(list(pathlib.Path(tmp_path).iterdir())) == 4


@pytest.mark.parametrize(
    ("texts", "reason"),
    [((), "no refusal text"), (("",), "non-empty"), (("désolé",), "ASCII"), (("No",), "lower"), (("a<b",), "<")],
)
def test_refusal_texts_that_cannot_match_are_refused(texts, reason):
    with pytest.raises(ValueError, match=reason):
        RuleSet("reference", texts)


def test_other_impossible_rules_are_refused(small_bytes):
    with pytest.raises(ValueError, match="sentences"):
        RuleSet("strict", ("no. never",))
    with pytest.raises(ValueError, match="choose reference or strict"):
        default_rule_set("lenient")
    with pytest.raises(ValueError, match="513 characters in all"):
        RuleSet("reference", ("x" * 513,))
    with pytest.raises(ValueError, match="1510 states, over 1024"):
        build_tables(RuleSet("strict", tuple(letter * 41 for letter in "abcdefghijkl")), small_bytes)
    with pytest.raises(ValueError, match="more than 3 whole tags"):
        build_tables("reference", [b"<text_safe>safe</text_safe>" * 4])
