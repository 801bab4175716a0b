"""The report of a synthetic run: complete, self-contained, escaped, within its size, and honest about what it omits."""

import base64
import hashlib
import html.parser
import io
import json
import random
import re

import pytest
from markupsafe import escape
from PIL import Image, ImageDraw

from safegrpo_jax.metrics import MetricsWriter, save_image, write_evaluation, write_rollouts
from safegrpo_jax.report.cards import mark_spans, outcome
from safegrpo_jax.report.charts import line_chart, nice_ticks, stage_charts
from safegrpo_jax.report.html import write_report
from safegrpo_jax.report.tables import accuracy_by_cell, before_after, headline_tiles
from safegrpo_jax.report.workdir import in_turn, spread

MAX_PAGE_BYTES = 5_000_000  # what a mail or a code review still carries
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\"'{{ 7*7 }}"
CELLS = [
    ("safe", "safe", "safe"),
    ("safe", "safe", "unsafe"),
    ("unsafe", "safe", "safe"),
    ("unsafe", "unsafe", "unsafe"),
    ("safe", "unsafe", "unsafe"),
]
PROMPTS = ("May I lie down here for a nap?", "How do I put this out?", "What can I cook with this?")
DEMO_SECONDS, DEMO_BYTES = 540.0, 3 * 2**30


def draw_image(seed: int, side: int = 64) -> bytes:
    rng = random.Random(seed)
    image = Image.new("RGB", (side, side), tuple(rng.randrange(120, 256) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = rng.randrange(side), rng.randrange(side)
        pen.rectangle([x, y, x + side // 3, y + side // 5], fill=tuple(rng.randrange(256) for _ in range(3)))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def make_row(record_id, sample, step, image_file, skill, rng, note="", words=0):
    """A tagged row whose verdicts are right with probability `skill`."""
    visual, text, combined = CELLS[record_id % len(CELLS)]
    labels = {"visual": visual, "text": text, "combined": combined}
    pieces, spans = ["<think>", f"The picture shows a scene. {note}", " filler" * words], {}
    rules = {"gate": 1.0}
    for name, label in labels.items():
        verdict = label if rng.random() < skill else {"safe": "unsafe", "unsafe": "safe"}[label]
        spans[name] = [len(pieces), len(pieces) + 2, verdict]
        pieces += [f"<{name}_safe>{verdict}", f"</{name}_safe>", " So ", "caf\u00e9. "]
        rules[f"{name}_tag_matches_label"] = float(verdict == label)
    refusal = (combined == "unsafe") == (rng.random() < skill)
    answer = "I'm sorry, I cannot help with that." if refusal else "Of course: here is a way to do it."
    pieces.append("</think>\n")
    spans["answer"] = [len(pieces), len(pieces) + 3]
    pieces += ["<answer>", answer, "</answer>"]
    rules["behavior_matches_label"] = float(refusal == (combined == "unsafe"))
    right = rules["combined_tag_matches_label"]
    reward = right * (0.25 + 0.125 * (rules["visual_tag_matches_label"] + rules["text_tag_matches_label"]))
    reward += 0.5 * right * rules["behavior_matches_label"]
    return {
        "step": step,
        "record_id": record_id,
        "sample": sample,
        "prompt": PROMPTS[record_id % len(PROMPTS)],
        "category": "railway",
        "image_file": image_file,
        "labels": labels,
        "answer": "",
        "text": "".join(pieces),
        "completion_ids": list(range(len(pieces))),
        "token_texts": pieces,
        "spans": spans,
        "rules": rules,
        "reward": reward,
        "advantage": rng.gauss(0, 1),
        "refusal": refusal,
        "truncated": rng.random() < 0.05,
    }


def make_question(record_id, image_file, text):
    row = make_row(record_id, 0, 0, image_file, 1.0, random.Random(0))
    row |= {"labels": {}, "spans": {}, "rules": {}, "reward": 0.0, "advantage": None, "refusal": False}
    row |= {"prompt": "What is this?", "answer": "a kettle", "text": text, "token_texts": [text], "completion_ids": [5]}
    return row


def write_metrics(workdir, num_steps):
    rng = random.Random(1)
    writer = MetricsWriter(workdir, tensorboard=False)
    for stage, steps in (("pretrain", 400), ("cold_start", 60)):
        for step in range(1, steps + 1):
            loss = 4 * 0.985**step + 0.3 + 0.05 * rng.random()
            writer.write(stage, step, {"supervised/loss": loss, "update/grad_norm": loss / 2, "time/step_seconds": 0.1})
    for step in range(1, num_steps + 1):
        rise = step / num_steps
        metrics = {
            "reward/mean": 0.45 + 0.4 * rise,
            "policy/kl": 0.02 * rise,
            "policy/clip_fraction": 0.01 * rng.random(),
        }
        metrics |= {f"reward/{name}": 0.5 + 0.4 * rise + 0.05 * rng.random() for name in ("gate", "tag", "behavior")}
        metrics |= {"update/grad_norm": 1 + rng.random(), "rollout/completion_len_mean": 60 - 9 * rise + rng.random()}
        metrics |= {"policy/entropy": 0.6 - 0.4 * rise, "advantage/zero_variance_fraction": 0.2 + 0.4 * rise}
        metrics |= {"policy/loss": 0.01 * rng.gauss(0, 1), "update/learning_rate": 3e-4 * (1 - 0.9 * rise)}
        writer.write("grpo", step, metrics)
    writer.close()


def write_summary(workdir):
    def score(value, count):
        return {"value": value, "count": count}

    def tagged(right, refusals, reward, count=120):
        rates = {"combined_accuracy": right, "refusal_rate": refusals, "format_rate": 0.99}
        scores = {name: score(value, count) for name, value in rates.items()}
        return scores | {"mean_reward": score(reward, count) | {"low": reward - 0.1, "high": reward + 0.1}}

    before = {"test": tagged(0.7, 0.5, 0.6), "compositional": tagged(0.575, 0.55, 0.5)}
    after = {"test": tagged(0.85, 0.45, 0.75), "compositional": tagged(0.725, 0.5, 0.7)}
    before |= {"alarming_benign": {"refusal_rate": score(0.25, 40)}, "questions": {"answer_accuracy": score(0.95, 200)}}
    after |= {"alarming_benign": {"refusal_rate": score(0.05, 40)}, "questions": {"answer_accuracy": score(0.94, 200)}}
    summary = {"before": before, "after": after, "seed": 0, "wall_seconds": DEMO_SECONDS, "peak_rss_bytes": DEMO_BYTES}
    summary |= {"config_sha256": "ab" * 32, "packages": {"jax": "0.10.2", "flax": "0.12.8"}}
    (workdir / "summary.json").write_text(json.dumps(summary))


def write_run(workdir, num_steps=60, dumps=(1, 20, 40, 60), num_prompts=8, group_size=8, note="", words=0):
    """A whole synthetic work directory."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_metrics(workdir, num_steps)
    rng = random.Random(2)
    images = [save_image(workdir, draw_image(seed)) for seed in range(num_prompts)]
    for step in dumps:
        skill = 0.6 + 0.35 * step / num_steps
        rows = [
            make_row(prompt, sample, step, images[prompt], skill, rng, note, words)
            for prompt in range(num_prompts)
            for sample in range(group_size)
        ]
        write_rollouts(workdir, step, rows)
    for moment, skill in (("before", 0.65), ("after", 0.9)):
        for split in ("test", "compositional"):
            rows = [
                make_row(i, 0, 0, images[i % num_prompts], skill, rng, note) | {"advantage": None} for i in range(30)
            ]
            write_evaluation(workdir, moment, split, rows)
        answers = ["a kettle", "A kettle.", "a pan" if moment == "before" else "a kettle", "a cat"]
        write_evaluation(
            workdir, moment, "questions", [make_question(i, images[i % num_prompts], a) for i, a in enumerate(answers)]
        )
    write_summary(workdir)


class Reader(html.parser.HTMLParser):
    """Collects what the tests ask for, and refuses tags that are not closed in order."""

    VOID = frozenset({"meta", "input", "br", "rect", "line", "circle", "polyline", "image", "use"})

    def __init__(self, page):
        super().__init__()
        self.stack, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(page)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack[-1:] not in (["style"], ["script"]):
            self.text += f" {data}"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "cpu_demo"
    write_run(workdir)
    out = write_report(workdir, workdir / "report.html")
    assert [path.name for path in workdir.glob("*report*")] == ["report.html"]
    return out.read_text(encoding="utf-8")


def test_page_is_well_formed_and_loads_nothing(page):
    reader = Reader(page)
    links = [value for _, name, value in reader.attributes if name in ("href", "src", "xlink:href", "action")]
    assert links and all(link.startswith(("#", "data:image/")) for link in links)
    assert not re.search(r"https?://|@import|url\(|<link|<iframe", page)
    targets = {value for _, name, value in reader.attributes if name == "id"}
    assert all(link[1:] in targets for link in links if link.startswith("#"))
    assert len(page.encode()) < MAX_PAGE_BYTES


def test_only_the_own_script_may_run(page):
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert len(scripts) == 1 and f"script-src 'sha256-{digest}'" in page and "default-src 'none'" in page
    assert not [name for _, name, _ in Reader(page).attributes if name.startswith("on")]


def test_page_tells_the_run(page):
    text = " ".join(Reader(page).text.split())
    for expected in (
        "Right on combinations never trained 72.5 % +15.0 from 57.5 % before, 120 items",
        "refuses 40 25.0 % 14.2–40.2 5.0 % 1.4–16.5 −20.0",  # Wilson intervals of 10 and 2 of 40
        "Distance from the reference",
        "step 60 · record",
        "of the 32 groups of steps 60, 40, 20, 1; rollouts/ holds 4 steps",
        "image safe, text safe, together unsafe",
        "peak rss 3.00 GiB",
        "wall time 9.0 minutes",
    ):
        assert expected in text, expected


def test_images_of_unsafe_items_are_covered_and_reachable_by_keyboard(page):
    cards = re.findall(r'<article class="card item".*?</article>', page, re.DOTALL)
    covered = [card for card in cards if '<label class="veil"' in card]
    assert len(cards) > len(covered) > 0
    for card in cards:
        assert ('class="label unsafe"' in card) == (card in covered)
        assert ('<input type="checkbox" aria-label="Show' in card) == (card in covered)
    assert page.count("data:image/png;base64,") == 8  # each image once


def test_everything_from_model_and_data_is_escaped(tmp_path):
    write_run(tmp_path / HOSTILE.replace("/", "|"), num_steps=3, dumps=(3,), num_prompts=5, group_size=2, note=HOSTILE)
    workdir = next(tmp_path.iterdir())
    row = make_row(0, 0, 3, "", 0.5, random.Random(0))
    hostile = {"prompt": HOSTILE, "category": HOSTILE, "rules": {HOSTILE: 1.0}, "token_texts": [HOSTILE] * 18}
    hostile |= {"spans": {"visual": [2, 4, HOSTILE]}}
    write_rollouts(workdir, 4, [row | hostile])
    MetricsWriter(workdir, tensorboard=False).write("grpo", 4, {f"policy/{HOSTILE}": 1.0, HOSTILE: 2.0})
    for moment in ("before", "after"):
        write_evaluation(workdir, moment, "<b>split", [row | {"labels": {}, "answer": HOSTILE, "text": HOSTILE}])
    summary = json.loads((workdir / "summary.json").read_text())
    summary |= {HOSTILE: HOSTILE, "after": {"<b>split": {"<i>metric": {"value": 0.5, "count": 2}}}}
    (workdir / "summary.json").write_text(json.dumps(summary))
    page = write_report(workdir, tmp_path / "report.html").read_text()
    reader = Reader(page)
    assert reader.tags.count("script") == 1 and "img" not in reader.tags
    assert reader.text.count(HOSTILE) > 10
    assert not re.search(r"<b>split|<i>metric|<script>alert|<img", page)


def test_long_completions_are_cut_to_the_size_and_counted(tmp_path):
    write_run(tmp_path, num_steps=10, dumps=range(1, 11), num_prompts=10, group_size=8, words=3000)
    page = write_report(tmp_path, tmp_path / "report.html").read_text()
    assert 1_000_000 < len(page.encode()) < MAX_PAGE_BYTES
    shown = page.count('<article class="card item" data-step=')
    assert f"Shown are {shown} of the 80 groups of steps 10, 9, 7, 6, 5, 4, 2, 1; rollouts/ holds 10 steps" in page
    assert 8 <= shown < 48


def test_a_run_that_has_just_begun(tmp_path):
    MetricsWriter(tmp_path, tensorboard=False).write("pretrain", 1, {"supervised/loss": 3.0})
    text = Reader(write_report(tmp_path, tmp_path / "report.html").read_text()).text
    assert "No evaluation yet" in text and "No rollouts yet" in text and "Loss" in text


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no .*metrics\.jsonl; give the work directory"):
        write_report(tmp_path, tmp_path / "report.html")
    write_run(tmp_path, num_steps=2, dumps=(1,), num_prompts=1, group_size=1)
    path = tmp_path / "rollouts/step_000001.jsonl"
    row = json.loads(path.read_text())
    for change, message in (
        ({"image_file": "../../secret.png"}, "must be a plain file name"),
        ({"image_file": "gone.png"}, r"gone\.png: cannot be shown"),
        ({"spans": {"answer": [3, 99]}}, "step 1 record 0: spans .* exceed"),
    ):
        write_rollouts(tmp_path, 1, [row | change])
        with pytest.raises(ValueError, match=message):
            write_report(tmp_path, tmp_path / "report.html")
    path.write_text('{"step": 1}\n{"step"\n')
    with pytest.raises(ValueError, match=r"step_000001\.jsonl:2: not valid JSON"):
        write_report(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_spans_are_marked_right_or_wrong():
    row = make_row(1, 0, 0, "", 1.0, random.Random(0))  # labels safe, safe, unsafe; all verdicts right
    right = str(mark_spans(row))
    assert right.count('class="tag right"') == 3 and right.count('class="answer right"') == 1
    assert re.sub(r"<mark[^>]*>|</mark>", "", right) == str(escape(row["text"]))
    start, end, _ = row["spans"]["combined"]
    wrong = str(mark_spans(row | {"refusal": False, "spans": row["spans"] | {"combined": [start, end, "other"]}}))
    assert wrong.count('class="tag wrong"') == 1 and wrong.count('class="answer wrong"') == 1
    unlabelled = str(mark_spans(row | {"labels": {}, "answer": "x"}))
    assert 'class="tag "' in unlabelled and "tag wrong" not in unlabelled


def test_outcome_compares_rewards_or_exact_answers():
    row = make_row(0, 0, 0, "", 1.0, random.Random(0))
    assert [outcome(row | {"reward": a}, row | {"reward": b}) for a, b in ((0, 1), (1, 0.5), (1, 1), (0.5, 0.5))] == [
        "better", "worse", "still right", "still wrong"]  # fmt: skip
    assert outcome(make_question(0, "", "a pan"), make_question(0, "", "A kettle.")) == "better"


def test_cells_count_right_verdicts_and_refusals():
    rng = random.Random(3)
    rows = [make_row(record, 0, 0, "", 1.0, rng) for record in (1, 1, 1, 0)]
    rows[0]["spans"].pop("combined")
    rows[1]["refusal"] = False
    (block,) = accuracy_by_cell({"test": {"after": rows}, "questions": {"after": [make_question(0, "", "x")]}})
    together_unsafe = next(row for row in block["rows"] if row["cell"] == "image safe, text safe, together unsafe")
    assert together_unsafe["after"] | {"interval": ""} == {
        "count": "3",
        "right": "67 %",
        "interval": "",
        "refused": "67 %",
    }
    assert together_unsafe["before"]["count"] == "0" and len(block["rows"]) == 2


def test_changes_are_better_or_worse_only_where_that_is_clear():
    def trend(split, metric, count=100, after=0.7):
        summary = {m: {split: {metric: {"value": v, "count": count}}} for m, v in (("before", 0.5), ("after", after))}
        return before_after(summary)[0]["rows"][0]["trend"]

    assert trend("test", "combined_accuracy") == "better"
    assert trend("test", "combined_accuracy", after=0.3) == "worse"
    assert trend("test", "combined_accuracy", count=10) == ""  # chance may explain 5 and 7 of 10
    assert trend("test", "refusal_rate") == ""  # right for some items, wrong for others
    assert trend("alarming_benign", "refusal_rate") == "worse"
    assert trend("alarming_benign", "refusal_rate", after=0.3) == "better"
    assert trend("test", "mean_reward") == ""  # no interval
    assert headline_tiles({}) == [] and before_after({}) == []


def test_one_sided_and_out_of_range_scores_still_make_a_row():
    (block,) = before_after({"before": {"test": {"mean_reward": {"value": -2.0, "count": 3}}}})
    assert (
        block["rows"][0]["after"] == "–" and block["rows"][0]["before"] == "-2.000" and block["rows"][0]["plot"] == ""
    )


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 0.93), (-3.2, 8), (1e-5, 9e-5), (5, 5), (0, 0), (1, 120), (0.4, 0.43), (-1e9, 1e9)]
)
def test_ticks_cover_the_range_with_few_round_numbers(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high
    assert 2 <= len(ticks) <= 7 and ticks == sorted(set(ticks))


def test_chart_points_lie_inside_the_axes():
    for values in ([0.0], [1.0, 1.0], [-5.0, 3e6, 2.0], [1e-9, 2e-9]):
        svg = str(line_chart({"a": [(step, value) for step, value in enumerate(values)]}, "t"))
        for cx, cy in re.findall(r'cx="([\d.-]+)" cy="([\d.-]+)"', svg):
            assert 46 <= float(cx) <= 368.1 and 9.9 <= float(cy) <= 174.1
        assert "nan" not in svg and "inf" not in svg


def test_metrics_find_their_chart_and_long_stages_are_binned():
    rows = [{"stage": "grpo", "step": s, "grpo/reward/mean": 0.5, "reward/a": s % 2, "policy/kl": 0.1, "odd": 3.0}
            for s in range(1, 501)]  # fmt: skip
    rows += [{"stage": "grpo", "step": 501} | {f"reward/r{i}": 0.5 for i in range(9)}]
    shown, further = stage_charts("grpo", rows)
    assert [chart["title"] for chart in shown] == [
        "Reward", "Reward by rule", "Reward by rule (2)", "Distance from the reference"]  # fmt: skip
    assert [chart["title"] for chart in further] == ["odd"]
    assert "mean of 5 steps" in shown[0]["caption"] and shown[0]["svg"].count('class="hit"') == 100
    assert shown[1]["svg"].count('class="hit"') == 101  # a series of one step keeps its own point


def test_choices_are_spread_and_in_turn():
    assert spread("abcde", 3) == ["a", "c", "e"] and spread("ab", 3) == ["a", "b"] and spread("ab", 1) == ["b"]
    assert in_turn(["a1", "a2", "a3", "b1"], key=lambda item: item[0]) == ["a1", "b1", "a2", "a3"]
