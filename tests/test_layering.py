"""Imports go to the same or a lower level only, without cycles; a few packages are fenced in.

`plan` is a package where the architecture's list has one file, plan.py: parsing a compiled program, counting its
operations and drawing the page are each a file's worth. Its level is that of the list.
"""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "safegrpo_jax"
LEVELS = {
    "types": 0, "masked": 0,
    "processes": 1, "sharding": 1, "models.rope": 1, "models.attention": 1,
    "data.records": 1, "data.safetag_vl": 1, "data.pictograms": 1, "data.pictogram_drawing": 1,
    "data.demo_tokenizer": 1,
    "rewards.automaton": 1, "rewards.spans": 1, "sampling.logits": 1,
    "data.cache": 1, "data.images": 1, "data.packing": 1, "data.pictogram_world": 1, "data.pictogram_shapes": 1,
    "models.layers": 1, "models.grouped": 1, "models.experts": 1, "models.splash": 1,
    "rewards.patterns": 1, "rewards.machines": 1,
    "models.vision": 2, "models.windowed_vision": 2, "models.lora": 2, "models.decoder": 2,
    "data.chat": 2, "data.processor": 2, "data.sources": 2, "rewards.rules": 2,
    "sampling.cache": 1, "sampling.schedule": 1, "sampling.decode": 2, "checkpoint": 2, "metrics": 2,
    "grpo.advantages": 1, "grpo.logps": 1, "grpo.loss": 2, "grpo.optimizer": 2,
    "models.qwen_vl": 3, "data.pipeline": 3, "rewards.compose": 3, "sampling.rollout": 3, "grpo.packing": 3,
    "grpo.update": 3,
    "models.hf_config": 4, "models.weight_table": 4, "models.hf_weights": 4, "policy": 4, "sft": 4,
    "evaluation": 5, "report": 5, "config": 5, "rewards.explain": 6, "programs": 6,
    "plan": 7, "run": 7, "step": 7, "train": 7, "main": 8,
}  # fmt: skip
TOY_TESTABLE = ("sampling.", "rewards.", "grpo.")  # they take functions, never the model


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def level(name: str) -> int:
    """Level of a module; a folder's level holds for all its modules that have none of their own."""
    if name in LEVELS:
        return LEVELS[name]
    return LEVELS[name.split(".")[0]]


def imports() -> dict[str, set[str]]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        if path.name == "__init__.py":
            continue
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        found[module_name(path)] = names
    return found


def own(names: set[str], modules: set[str]) -> set[str]:
    stripped = {name.removeprefix("safegrpo_jax.") for name in names if name.startswith("safegrpo_jax.")}
    return stripped & modules


def test_imports_go_down():
    found = imports()
    assert len(found) > 25
    for module, names in found.items():
        for target in own(names, set(found)):
            assert level(target) <= level(module), f"{module} ({level(module)}) imports {target} ({level(target)})"


def test_no_cycles():
    found = imports()
    graph = {module: own(names, set(found)) for module, names in found.items()}
    done: set[str] = set()
    while len(done) < len(graph):
        ready = {module for module, targets in graph.items() if module not in done and targets - {module} <= done}
        assert ready, f"import cycle among {sorted(set(graph) - done)}"
        done |= ready


def test_fences():
    for module, names in imports().items():
        roots = {name.split(".")[0] for name in names}
        assert not roots & {"torch", "torchvision", "tensorflow", "pickle"}, module
        if module.startswith(TOY_TESTABLE):
            assert not any(name.startswith("safegrpo_jax.models") for name in names), module
        if not module.startswith("models."):
            assert "flax" not in roots, f"{module}: nnx stays under models/"
