"""The config tree: shipped files are complete and valid; bad ones are refused with the key and the remedy."""

import dataclasses
import importlib

import pytest
from ml_collections import ConfigDict

from configs import base, cpu_demo
from safegrpo_jax import config as config_lib
from safegrpo_jax.rewards.compose import RewardConfig


def valid(**changes):
    values = {"train": {"prompts_per_step": 8}, "policy_update": {"num_minibatches": 2}}
    return ConfigDict(values | changes)


@pytest.mark.parametrize("name, arg", [("base", ""), *(("cpu_demo", arg) for arg in cpu_demo.LENGTHS)])
def test_shipped_configs_are_valid(name, arg):
    config = config_lib.from_config_dict(importlib.import_module(f"configs.{name}").get_config(arg))
    assert config.train.num_steps > 0


def test_base_agrees_with_the_dataclass_defaults_or_says_otherwise():
    # base.py is the recipe at scale; where it differs from a dataclass default it does so on purpose.
    default, written = config_lib.Config(), config_lib.from_config_dict(base.get_config())
    differing = {
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(default)
        if dataclasses.is_dataclass(getattr(default, section.name))
        for field in dataclasses.fields(getattr(default, section.name))
        if getattr(getattr(default, section.name), field.name) != getattr(getattr(written, section.name), field.name)
    }
    assert differing <= {
        "model.compute_dtype", "model.remat", "model.scan_layers", "model.logits_chunk",
        "policy_update.num_minibatches",
        "pretrain.optimizer", "cold_start.optimizer", "evaluation.validate_every", "evaluation.validation_split",
        "processor.max_image_pixels",
    }  # fmt: skip


def test_demo_length_moves_with_its_schedule():
    values = cpu_demo.get_config()
    values.train.num_steps = 400
    assert config_lib.from_config_dict(values).optimizer.total_steps == 400


def test_a_stage_of_no_steps_needs_no_schedule():
    values = cpu_demo.get_config()
    values.pretrain.num_steps = 0
    assert config_lib.from_config_dict(values).pretrain.num_steps == 0


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"train": {"prompts_per_step": 7}}, "prompts_per_step=7 must be a multiple of 2"),
        ({"train": {}, "mesh": {"data": 3}}, "prompts_per_step=256 must be a multiple of 6"),
        ({"trian": {}}, "config.trian: no such key; did you mean 'train'?"),
        ({"train": {"num_stepz": 3}}, "config.train.num_stepz: no such key; did you mean 'num_steps'?"),
        ({"train": {"num_steps": "many"}}, "config.train.num_steps: expected int, got 'many'"),
        ({"train": 3}, "config.train: expected a section"),
        ({"sampling": {"group_size": 1}}, "group_size must be at least 2"),
        ({"data": {"on_bad_row": "ignore"}}, "use 'raise' or 'skip'"),
        ({"loss": {"replay_weight": 0.3}}, "replay_weight and config.train.replay_batch go together"),
        ({"rewards": {"rule_set": "lenient"}}, "lenient"),
        ({"rewards": {"refusal_keywords": ("d\u00e9sol\u00e9",)}}, "without '<'"),
        ({"rewards": {"keyword_rules": ({"name": "x", "texts": ("<b>",)},)}}, "keyword '<b>' cannot be matched"),
        ({"rewards": {"keyword_rules": ({"name": "x", "text": ("b",)},)}}, "did you mean 'texts'?"),
        ({"rewards": {"refusal_phrases": tuple(letter * 41 for letter in "abcdefghijkl")}}, "states, over 1024"),
        ({"rewards": {"overlong_buffer": 5000}}, "overlong_buffer=5000 exceeds sampling.max_new_tokens=4096"),
        ({"advantages": {"credit": "token"}}, "use one of completion, span"),
        ({"sampling": {"max_new_tokens": 5000}}, "max_new_tokens=5000 exceeds"),
        ({"loss": {"ratio_anchor": "policy"}}, "right with one update per batch only"),
        (
            {"loss": {"kl_in_reward": True}, "advantages": {"normalize": "per_rule"}},
            "kl_in_reward changes the total reward, which advantages.normalize='per_rule' does not read",
        ),
        ({"model": {"compute_dtype": "float16"}}, "use 'float32' or 'bfloat16'"),
        ({"model": {"lora": {"rank": 2}}}, "lora.rank=2 adapts a trained model: set config.model.path"),
        (
            {"model": {"path": "x", "freeze_vision": True, "lora": {"rank": 2, "vision_projections": ("qkv",)}}},
            "would never be trained, since freeze_vision=True",
        ),
    ],
)
def test_bad_configs_are_refused_by_name(changes, expected):
    with pytest.raises(ValueError, match=expected.replace("?", r"\?")):
        config_lib.from_config_dict(valid(**changes))


def test_rules_of_ones_own_are_read_from_a_config():
    values = base.get_config()
    values.rewards.tag_weight, values.rewards.behavior_weight = 0.5, 0.25
    values.rewards.keyword_rules = (dict(name="no_links", texts=("http://",), weight=0.25),)
    rewards = config_lib.from_config_dict(values).rewards
    assert rewards.weights == {"tag_reward": 0.5, "behavior_reward": 0.25, "no_links": 0.25}
    assert [tuple(keywords) for keywords in rewards.rules().keyword_sets] == [(("http://",), "answer")]
    assert config_lib.from_config_dict(base.get_config()).rewards == RewardConfig()  # the published reward


def test_hash_depends_on_values_alone():
    one, same, other = (config_lib.from_config_dict(valid(seed=seed)) for seed in (1, 1, 2))
    assert config_lib.config_sha256(one) == config_lib.config_sha256(same) != config_lib.config_sha256(other)
