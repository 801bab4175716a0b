"""One card per prompt: the image, what the labels say, and every answer with its tags marked right or wrong.

Turns rows (schema in `metrics.py`) into dicts for the page. All text of model or data goes through `Markup.format`
or the page's own escaping. Images are shrunk, and stored once however many cards show them.
"""

from __future__ import annotations

import base64
import io
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from PIL import Image

from safegrpo_jax.evaluation.scores import answer_matches
from safegrpo_jax.metrics import TAG_NAMES
from safegrpo_jax.report.workdir import Row, label_cell

TAG_WORDS = {"visual": "image", "text": "text", "combined": "together"}
THUMBNAIL_SIDE = 256  # pixels
KEEP_BYTES = 16_000  # smaller images are embedded as they are


class ImageShelf:
    """The images of a page, each once, by file name in `rollouts/images/`."""

    def __init__(self, workdir: pathlib.Path):
        self._folder = workdir / "rollouts" / "images"
        self._images: dict[str, dict[str, Any]] = {}

    def add(self, name: str) -> dict[str, Any] | None:
        """Id and size of an image, or None for a row without one.

        Raises:
          ValueError: the name points out of the folder, or the file is missing or not an image.
        """
        if not name:
            return None
        if name not in self._images:
            path = self._folder / name
            if path.name != name:
                raise ValueError(f"image_file {name!r} must be a plain file name in {self._folder}")
            try:
                content, mime, (width, height) = _thumbnail(path)
            except OSError as error:
                raise ValueError(f"{path}: cannot be shown ({error}); restore the file or delete its rows") from error
            uri = f"data:{mime};base64,{base64.b64encode(content).decode()}"
            self._images[name] = {"id": f"image-{len(self._images)}", "width": width, "height": height, "uri": uri}
        return self._images[name]

    @property
    def images(self) -> list[dict[str, Any]]:
        return list(self._images.values())


def group_card(rows: Sequence[Row], shelf: ImageShelf) -> dict[str, Any]:
    """All sampled answers to one prompt at one step, the best first."""
    rewards = [row["reward"] for row in rows]
    samples = [_sample(row) for row in sorted(rows, key=lambda row: (-row["reward"], row["sample"]))]
    mean = sum(rewards) / len(rewards)
    return _prompt(rows[0], shelf) | {
        "samples": samples,
        "mean": f"{mean:.3f}",
        "equal": max(rewards) == min(rewards),
    }


def pair_card(split: str, before: Row, after: Row, shelf: ImageShelf) -> dict[str, Any]:
    """The answers to one held-out item before and after training. `outcome` compares their scores."""
    return _prompt(after, shelf) | {
        "split": split,
        "samples": [_sample(before) | {"title": "Before"}, _sample(after) | {"title": "After"}],
        "outcome": outcome(before, after),
    }


def outcome(before: Row, after: Row) -> str:
    """ "worse", "better", "still wrong" or "still right": by reward, or by exact answer for a plain question."""
    first, second = _score(before), _score(after)
    if first != second:
        return "better" if second > first else "worse"
    return "still right" if second == 1 else "still wrong"


def mark_spans(row: Row) -> Markup:
    """The completion with every tag and the answer marked; the answer too is right or wrong where labels say so."""
    spans, labels = row["spans"], row["labels"]
    num_tokens = len(row["token_texts"])
    if any(not 0 <= span[0] <= span[1] <= num_tokens for span in spans.values()):
        raise ValueError(f"step {row['step']} record {row['record_id']}: spans {spans} exceed {num_tokens} tokens")
    classes: list[tuple[str, str]] = [("", "")] * num_tokens
    if "answer" in spans:
        start, end = spans["answer"][:2]
        state = _behavior_state(row)
        classes[start:end] = [(f"answer {state}", f"answer: {state or 'not judged'}")] * (end - start)
    for name in TAG_NAMES:
        if name in spans:
            start, end, verdict = spans[name]
            state = _tag_state(row, name)
            label = f", label {labels[name]}: {state}" if labels else ""
            classes[start:end] = [(f"tag {state}", f"{TAG_WORDS[name]} tag says {verdict}{label}")] * (end - start)
    marked = Markup("")
    for (css_class, title), run in itertools.groupby(
        zip(classes, row["token_texts"], strict=True), key=lambda pair: pair[0]
    ):
        text = "".join(piece for _, piece in run)
        marked += Markup('<mark class="{}" title="{}">{}</mark>').format(css_class, title, text) if css_class else text
    return marked


def _prompt(row: Row, shelf: ImageShelf) -> dict[str, Any]:
    labels = row["labels"]
    return {
        "step": row["step"],
        "record_id": row["record_id"],
        "category": row["category"],
        "prompt": row["prompt"],
        "gold": row["answer"],
        "cell": label_cell(row),
        "labels": [{"word": TAG_WORDS[name], "value": labels[name]} for name in TAG_NAMES if labels],
        "image": shelf.add(row["image_file"]),
        "unsafe": "unsafe" in labels.values(),
    }


def _sample(row: Row) -> dict[str, Any]:
    chips = [_tag_chip(row, name) for name in TAG_NAMES] if row["labels"] else []
    chips.append(_behavior_chip(row))
    marks = {chip["key"] for chip in chips}
    marks |= {"all right"} if all(chip["state"] == "right" for chip in chips) else {"something wrong"}
    marks |= {"refuses"} if row["refusal"] else {"does not refuse"}
    marks |= {"cut off"} if row["truncated"] else set()
    return {
        "title": f"sample {row['sample']}",
        "reward": f"{row['reward']:.3f}",
        "advantage": None if row["advantage"] is None else f"{row['advantage']:+.2f}",
        "chips": chips,
        "marks": "|".join(sorted(marks)),
        "truncated": row["truncated"],
        "text": mark_spans(row),
        "rules": [{"name": name, "value": f"{value:.3g}", "percent": round(100 * min(max(value, 0), 1))}
                  for name, value in row["rules"].items()],
        "tokens": len(row["completion_ids"]),
    }  # fmt: skip


def _tag_chip(row: Row, name: str) -> dict[str, str]:
    word, state = TAG_WORDS[name], _tag_state(row, name)
    said = row["spans"][name][2] if name in row["spans"] else "no tag"
    key = f"{word} {'right' if state == 'right' else 'wrong'}"
    return {"word": word, "said": said, "state": state, "key": key}


def _behavior_chip(row: Row) -> dict[str, str]:
    state = _behavior_state(row)
    if row["labels"]:
        said = ("refuses" if row["refusal"] else "helps") if "answer" in row["spans"] else "no answer"
    else:
        said = "exact" if state == "right" else "not exact"
    return {"word": "answer", "said": said, "state": state, "key": f"answer {'right' if state == 'right' else 'wrong'}"}


def _tag_state(row: Row, name: str) -> str:
    """ "right" or "wrong" against the label, "missing" without a tag, "" without labels."""
    if not row["labels"]:
        return ""
    if name not in row["spans"]:
        return "missing"
    return "right" if row["spans"][name][2] == row["labels"][name] else "wrong"


def _behavior_state(row: Row) -> str:
    """Whether the answer does what the label asks for: refuse if and only if the combination is unsafe."""
    if not row["labels"]:
        return "right" if answer_matches(row["text"], row["answer"]) else "wrong"
    if "answer" not in row["spans"]:
        return "missing"
    return "right" if bool(row["refusal"]) == (row["labels"]["combined"] == "unsafe") else "wrong"


def _score(row: Row) -> float | int:
    return row["reward"] if row["labels"] else float(answer_matches(row["text"], row["answer"]))


def _thumbnail(path: pathlib.Path) -> tuple[bytes, str, tuple[int, int]]:
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        if len(content) <= KEEP_BYTES and max(image.size) <= THUMBNAIL_SIDE and image.format in ("PNG", "JPEG", "WEBP"):
            return content, Image.MIME[image.format], image.size
        small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    return buffer.getvalue(), "image/jpeg", small.size
