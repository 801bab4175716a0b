"""The tokenizer of the embedded model: a small byte-level BPE in Qwen's manner, trained on the embedded corpus.

Owns the making of the tokenizer folder; using it is `processor.py`'s work. The one idea: merge until every word of the
corpus is one token, so that a demonstration is short, while the 256 byte tokens keep any other text expressible and
decoding concatenative. Normalisation, split pattern, control tokens and their order are those of Qwen (public
tokenizer.json of Qwen/Qwen3-VL-4B-Thinking); the chat template renders the same prompts in its own words.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from safegrpo_jax.data import pictograms

CONTROL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VISIBLE_TOKENS = ("<think>", "</think>")  # one id each, kept when control tokens are left out
_MAX_VOCABULARY = 4096  # never reached: merging stops when each word is one token
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- else -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is not defined or enable_thinking -%}
{{- '<think>\\n' -}}
{%- endif -%}
{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Trains the byte-level BPE on `texts`. Order of ids: 256 bytes, merges, control tokens, visible tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=_MAX_VOCABULARY,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Visible tokens never reach the merges: in use they are cut out before the text is split into words.
    pieces = (piece for text in texts for piece in _without_visible_tokens(text))
    tokenizer.train_from_iterator(pieces, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in VISIBLE_TOKENS])
    return tokenizer


def _without_visible_tokens(text: str) -> list[str]:
    for token in VISIBLE_TOKENS:
        text = text.replace(token, "\0")
    return text.split("\0")


def build_tokenizer(folder: str | pathlib.Path, extra_texts: Iterable[str] = ()) -> pathlib.Path:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja, which `transformers.AutoTokenizer` loads.

    `extra_texts`: more text whose words become tokens, such as the instruction put after each prompt. The same texts
    give the same files, byte for byte. Returns the folder.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer([*pictograms.corpus(), *extra_texts])
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token in CONTROL_TOKENS,
        }
        for token in (*CONTROL_TOKENS, *VISIBLE_TOKENS)
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": added,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
    return folder
