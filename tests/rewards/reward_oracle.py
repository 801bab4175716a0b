"""What the reward rules mean, told by Python `re` on decoded text, and strings built to break anything else."""

import dataclasses
import random
import re

import numpy as np

TAGS = ("visual", "text", "combined")
KEYWORDS = (
    "sorry", "cannot", "not appropriate", "unsafe", "unable", "refuse", "i can't", "not allowed", "restricted",
)  # fmt: skip
MARKERS = ["<think>", "</think>", "<answer>", "</answer>"] + [f"<{s}{t}_safe>" for t in TAGS for s in ("", "/")]
_FLAGS = re.DOTALL | re.IGNORECASE
_TAG = {tag: re.compile(rf"<{tag}_safe>(safe|unsafe)</{tag}_safe>", _FLAGS) for tag in TAGS}
_GATE = re.compile(
    ".*" + ".*".join(pattern.pattern for pattern in _TAG.values()) + r".*</think>\s*<answer>.*</answer>", _FLAGS
)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", _FLAGS)
TAG_PATTERNS, ANSWER_PATTERN = tuple(_TAG.values()), _ANSWER
_MARKER = re.compile("|".join(MARKERS), re.IGNORECASE)
_STRICT = (["<think>"], ["<visual_safe>", "</visual_safe>", "<text_safe>", "</text_safe>", "<combined_safe>",
           "</combined_safe>", "</think>", "<answer>", "</answer>"])  # fmt: skip
_INVISIBLE = "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\x7f" + "".join(map(chr, range(32)))


@dataclasses.dataclass
class Found:
    gate: bool
    verdicts: list[str]  # "", safe, unsafe, other
    tag_bytes: list[tuple[int, int] | None]
    counts: list[int]
    answer: str | None
    answer_bytes: tuple[int, int, int, int] | None  # opening marker, content, closing marker, end


def reference(data: bytes, keywords=KEYWORDS) -> tuple[Found, bool]:
    """What the published patterns find in the decoded bytes, and whether the answer is a refusal."""
    text = data.decode("utf-8", errors="surrogateescape")  # matches as U+FFFD does, but keeps byte offsets

    def offset(position: int) -> int:
        return len(text[:position].encode("utf-8", errors="surrogateescape"))

    verdicts, places, counts = [], [], []
    for pattern in _TAG.values():
        match = pattern.search(text)
        word = match.group(1).lower() if match else ""
        verdicts.append(word if word in ("", "safe", "unsafe") else "other")
        places.append((offset(match.start()), offset(match.end())) if match else None)
        counts.append(len(pattern.findall(text)))
    match = _ANSWER.search(text)
    edges = match and tuple(map(offset, (match.start(), match.start(1), match.end(1), match.end())))
    decoded = data.decode("utf-8", errors="replace")
    answer = _ANSWER.search(decoded)
    content = answer.group(1) if answer else None
    refusal = content is not None and any(keyword in content.lower() for keyword in keywords)
    gate = _GATE.fullmatch(decoded.strip()) is not None
    return Found(gate, verdicts, places, counts, content, edges), refusal


def strict_gate(data: bytes) -> bool:
    """Every marker once, lower case, in order; bodies exact; a visible answer and nothing behind it."""
    text = data.decode("utf-8", errors="replace")
    matches = list(_MARKER.finditer(text))
    names = [match.group() for match in matches]
    if names[:1] == _STRICT[0] and not text[: matches[0].start()].strip():
        matches, names = matches[1:], names[1:]
    if names != _STRICT[1]:
        return False
    between = [text[a.end() : b.start()] for a, b in zip(matches, matches[1:], strict=False)]
    bodies_ok = all(body in ("safe", "unsafe") for body in between[0:6:2])
    answer_visible = any(not c.isspace() and c not in _INVISIBLE for c in between[7])
    return bodies_ok and not between[6].strip() and answer_visible and not text[matches[-1].end() :].strip()


def strict_behavior(answer: str, phrases) -> str:
    """help, refusal or ambiguous for the text of an answer."""
    lowered = re.sub("[\u2019\u02bc]", "'", answer)
    starts = [
        match.start()
        for phrase in phrases
        for match in re.finditer(rf"(?<![A-Za-z0-9])(?={re.escape(phrase)})", lowered, re.IGNORECASE | re.ASCII)
    ]
    if not starts:
        return "help"
    early = any(len(re.findall(r"[^.!?\n][.!?\n]+", lowered[:start])) < 2 for start in starts)
    return "refusal" if early else "ambiguous"


_FOLDS = {"i": "\u0130\u0131", "k": "\u212a", "s": "\u017f"}
_BITS = [
    "safe", "unsafe", "Safe", "UNSAFE", "un\u017fafe", "unsure", "", " safe", "sorry", "SORRY", "\u017forry",
    "cannot", "I can't", "I can\u2019t", "I won't", "I'm sorry", "unable", "restricted", "refuse", "not allowed",
    "i can'", "help. ", "First. Second! Third? ", "Delhi cannot", ".\n", "\n", "<", "<<", "</", ">", "<answer",
    "answer>", "</answer", "<visual_sa", "_safe>", "</think", "x", " ", "\t", "\u2003", "\x1c", "\x85", "\u3000",
    "\u200b", "\ufeff", "\u00ad", "\u2028", "\x00", "\u3002", "\u00e9", "\U0001f600", "Step 1: ",
]  # fmt: skip
_BROKEN = [b"\xff", b"\xe2\x80", b"\xc5", b"\xf0\x9f", b"\x80", b"\xe2\x84", b"\xed\xa0\x80", b"\xc0\xbc"]


def adversarial(rng: random.Random) -> bytes:
    """A response close to well-formed, with some of everything that could go wrong."""
    parts = ["<think>"] if rng.random() < 0.2 else []
    for tag in TAGS:
        body = rng.choice(["safe", "unsafe"]) if rng.random() < 0.95 else rng.choice(_BITS)
        parts += [rng.choice(["", "A road. ", "text ", "\n"]), f"<{tag}_safe>", body, f"</{tag}_safe>"]
    parts += [rng.choice(_BITS), "</think>", rng.choice(["", "\n", "\u2003 ", "\x1c"]), "<answer>"]
    parts += rng.choices(_BITS, k=rng.randrange(5))
    parts += ["</answer>", rng.choice(["", "\n", "\u3000", "\u200b", " \x85"])]
    for _ in range(rng.choice([0, 0, 1, 1, 2, 3, 5])):
        at = rng.randrange(len(parts))
        match rng.randrange(6):
            case 0:
                parts.insert(at, rng.choice(MARKERS + _BITS))
            case 1:
                del parts[at]
            case 2:
                parts.insert(rng.randrange(len(parts)), parts[at])
            case 3:
                parts[at] = parts[at].upper()
            case 4:
                part = parts[at]
                hits = [i for i, c in enumerate(part) if c.lower() in _FOLDS]
                if hits:
                    i = rng.choice(hits)
                    parts[at] = part[:i] + rng.choice(_FOLDS[part[i].lower()]) + part[i + 1 :]
            case 5:
                tag = rng.choice(TAGS)
                parts.insert(at, f"<{tag}_safe>{rng.choice(['safe', 'unsafe', 'unsafe '])}</{tag}_safe>")
        if len(parts) < 4:
            break
    data = "".join(parts).encode()
    if rng.random() < 0.15:
        at = rng.randrange(len(data) + 1)
        data = data[:at] + rng.choice(_BROKEN) + data[at:]
    return data


class Segmenter:
    """Cuts bytes into random vocabulary pieces; now and then a token without bytes in between."""

    def __init__(self, token_bytes: list[bytes], rng: random.Random):
        self.ids = {}
        for token_id, piece in enumerate(token_bytes):
            self.ids.setdefault(piece, token_id)
        self.prefixes = {piece[:n] for piece in token_bytes for n in range(1, len(piece) + 1)}
        self.rng = rng

    def __call__(self, data: bytes) -> list[int]:
        ids, start = [], 0
        while start < len(data):
            pieces, end = [], start + 1
            while end <= len(data) and data[start:end] in self.prefixes:
                if data[start:end] in self.ids:
                    pieces.append(data[start:end])
                end += 1
            piece = self.rng.choice((*pieces, pieces[-1], pieces[-1]))
            ids.append(self.ids[piece])
            start += len(piece)
            if b"" in self.ids and self.rng.random() < 0.01:
                ids.append(self.ids[b""])
        return ids


def pad(rows: list[list[int]], num_columns: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded ids and mask."""
    num_columns = num_columns or max(map(len, rows))
    ids = np.zeros((len(rows), num_columns), np.int32)
    mask = np.zeros((len(rows), num_columns), bool)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = True
    return ids, mask
