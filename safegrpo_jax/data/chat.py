"""Prompt text -> token ids through the chat template of a checkpoint, safe against control tokens in user text.

Owns the template, the tokenizer and the ids they define; knows nothing of pixels or batches.

The one idea: user text is data. A tokenizer would read `<|im_end|>` or `</think>` typed by a user as the control token.
Here the added tokens found in a prompt are broken by a private character before the template is rendered; the rendered
text is split at the added tokens that remain, all of them trusted; and the pieces between, freed of the private
character, are encoded by the tokenizer's pipeline without its added tokens.

Source: chat format of Qwen3-VL as of huggingface/transformers 5.23 (behaviour only).
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Sequence

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from safegrpo_jax.data.records import IMAGE_MARK

IMAGE_TOKEN = "<|image_pad|>"
VIDEO_TOKEN = "<|video_pad|>"
REASONING_START = "<think>\n"  # what the templates of thinking models put before the response


class ChatTokenizer:
    """A tokenizer with its chat template.

    `tokenizer` is that of transformers. Ids: `pad_id`, `eos_id`, `image_token_id`, and `stop_ids`, those that end a
    response.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        """Raises ValueError where the tokenizer lacks the template or an id, or has added tokens that eat spaces."""
        if not isinstance(tokenizer.chat_template, str):
            raise ValueError("the tokenizer has no chat template; add chat_template.jinja to the model folder")
        for name in ("pad_token_id", "eos_token_id"):
            if getattr(tokenizer, name) is None:
                raise ValueError(f"the tokenizer has no {name}; set it in tokenizer_config.json")
        added = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
        if IMAGE_TOKEN not in added:
            raise ValueError(f"the tokenizer has no token {IMAGE_TOKEN}; use the tokenizer of a Qwen-VL model")
        for token in tokenizer.added_tokens_decoder.values():
            if token.lstrip or token.rstrip or token.single_word:
                raise ValueError(f"added token {token.content!r} absorbs its surroundings; that is not supported")
        self.pad_id: int = tokenizer.pad_token_id
        self.eos_id: int = tokenizer.eos_token_id
        self.image_token_id: int = added[IMAGE_TOKEN]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys((self.eos_id, self.pad_id)))
        self.tokenizer = tokenizer
        self._added_ids = added
        longest_first = "|".join(re.escape(content) for content in sorted(added, key=len, reverse=True))
        self._added_token = re.compile(f"({longest_first})")
        self._added_token_start = re.compile(f"(?s)(?=(?:{longest_first}))(.)")
        self._can_switch_reasoning = "enable_thinking" in tokenizer.chat_template

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path) -> ChatTokenizer:
        """Loads tokenizer and template of a Hugging Face folder; no remote code, no network.

        Raises:
          ValueError: no such folder, or tokenizer files or template missing.
        """
        folder = pathlib.Path(folder)
        if not folder.is_dir():
            raise ValueError(f"model folder {folder} does not exist; set config.model.path to a Qwen-VL folder")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} has no {name}; copy the tokenizer files of the checkpoint into it")
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{folder}: the tokenizer does not load ({reason}); copy its files again") from None
        old_template = folder / "chat_template.json"  # where early Qwen-VL checkpoints keep it
        if not tokenizer.chat_template and old_template.is_file():
            tokenizer.chat_template = json.loads(old_template.read_text(encoding="utf-8"))["chat_template"]
        if not tokenizer.chat_template:
            raise ValueError(f"{folder} has no chat template; copy the checkpoint's chat_template.jinja into it")
        return cls(tokenizer)

    def encode_prompt(self, prompt: str, num_images: int, instruction: str, reasoning: bool) -> list[int]:
        """Ids of the user turn and the opening of the response, with one image token per image.

        `prompt` is untrusted and holds no control token, whatever it spells; `instruction` is trusted and follows after
        an empty line. Images stand at the `<image>` marks of the prompt, first where it has none. Without `reasoning`,
        a template that knows `enable_thinking` is told not to open it.

        Raises:
          ValueError: marks and images differ in number, or the template drops or adds images.
        """
        taken = prompt + instruction + self.tokenizer.chat_template
        shield = next(char for char in map(chr, range(0xE000, 0xF8FF)) if char not in taken)
        parts = [self._added_token_start.sub(rf"\1{shield}", part) for part in prompt.split(IMAGE_MARK)]
        if len(parts) == 1:
            parts = [""] * num_images + parts
        if len(parts) != num_images + 1:
            raise ValueError(f"prompt has {len(parts) - 1} {IMAGE_MARK} marks for {num_images} images; make them equal")
        parts[-1] += f"\n\n{instruction}" if instruction else ""
        content = []
        for part in parts:
            content += [{"type": "text", "text": part}] if part else []
            content += [{"type": "image"}]
        content.pop()  # images stand between parts, so one too many
        options = {} if reasoning or not self._can_switch_reasoning else {"enable_thinking": False}
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True, **options
        )
        ids = self._encode_rendered(rendered, shield)
        if ids.count(self.image_token_id) != num_images:
            raise ValueError(
                f"the chat template wrote {ids.count(self.image_token_id)} image tokens for {num_images} images; "
                "use the template of a vision-language checkpoint"
            )
        if self._added_ids.get(VIDEO_TOKEN) in ids:
            raise ValueError(f"the chat template or the instruction wrote {VIDEO_TOKEN}: videos are not supported")
        return ids

    def encode_response(self, response: str, prompt_ids: Sequence[int]) -> list[int]:
        """Ids of a demonstration, encoded as one text, and the end token.

        `<think>` and its like become their tokens, special tokens spelt out do not. An opening of the reasoning that
        the prompt already ends in is left out.
        """
        opening = self._encode(REASONING_START)
        if list(prompt_ids[-len(opening) :]) == opening:
            response = response.removeprefix(REASONING_START)
        return [*self._encode(response), self.eos_id]

    def decode(self, token_ids: Sequence[int], keep_special: bool = False) -> str:
        """Text of ids; `keep_special` shows special tokens such as `<|im_end|>`."""
        return self.tokenizer.decode(
            list(token_ids), skip_special_tokens=not keep_special, clean_up_tokenization_spaces=False
        )

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def _encode_rendered(self, rendered: str, shield: str) -> list[int]:
        ids = []
        for index, piece in enumerate(self._added_token.split(rendered)):
            is_added_token = index % 2 == 1
            ids += [self._added_ids[piece]] if is_added_token else self._encode_plain(piece.replace(shield, ""))
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        """The tokenizer's pipeline without its added tokens, which `encode` cannot be told to ignore entirely."""
        backend = self.tokenizer.backend_tokenizer
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        pieces = [text]
        if backend.pre_tokenizer is not None:
            pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for piece in pieces for token in backend.model.tokenize(piece)]
