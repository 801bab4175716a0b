"""What building a run makes of plain questions whose gold answers the reward lists."""

import json

import jax
import pytest

from configs import cpu_demo
from safegrpo_jax import config as config_lib
from safegrpo_jax import run as run_lib

ROW = {"images": [], "text_tag": "safe", "image_tag": "safe", "combine_tag": "safe"}
QUESTION = {"images": [], "text_tag": "", "image_tag": "", "combine_tag": "", "tagged": False}


def build(folder, rows):
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = cpu_demo.get_config("smoke")
    values.cache_folder = str(folder / "cache")
    values.data.path = str(data)
    values.mesh.data = 8
    small = values.model.small
    small.text_width = small.text_mlp_width = small.vision_width = small.vision_mlp_width = 32
    small.text_layers, small.text_heads, small.text_kv_heads, small.text_head_dim = 2, 2, 1, 16
    small.vision_layers, small.vision_heads, small.deepstack_layers = 2, 2, (0,)
    values.rewards.anchor_answers = ("red", "blue")
    return run_lib.build_run(config_lib.from_config_dict(values), folder / "run", ("train",))


def test_gold_answers_reach_the_labels(tmp_path):
    rows = [
        ROW | {"prompt": "May I touch it?", "answer": "red"},
        QUESTION | {"prompt": "Which colour?", "answer": "Blue."},
        QUESTION | {"prompt": "Which colour is it?", "answer": "red"},
        ROW | {"prompt": "May I eat it?"},
    ]
    run = build(tmp_path, rows)
    records = run.records["train"] * 2
    with jax.set_mesh(run.mesh):
        labels = run.prompts(records, 8).labels
    assert labels.gold_answer.tolist() == [0, 2, 1, 0] * 2  # a tagged row has none, whatever its column says
    assert labels.tagged.tolist() == [True, False, False, True] * 2


def test_a_question_that_cannot_be_graded_is_named(tmp_path):
    with pytest.raises(
        ValueError, match="record 1 of split 'train': answer 'green' is not among rewards.anchor_answers"
    ):
        build(tmp_path, [ROW | {"prompt": "May I?"}, QUESTION | {"prompt": "Which colour?", "answer": "green"}])
