"""Checkpoints: exact round trips over device counts, retention, damage, kills, and runs that do not match."""

import dataclasses
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from safegrpo_jax.checkpoint import CheckpointConfig, Checkpoints, SavedStep, config_sha256
from safegrpo_jax.types import TrainState

STAGES = ("pretrain", "cold_start", "grpo")
RUN_CONFIG = {"seed": 0, "model": {"num_layers": 2, "betas": (0.9, 0.99)}, "metrics": {"wandb": False}}


def open_checkpoints(workdir, run_config=RUN_CONFIG, fingerprint="data-1", **config):
    return Checkpoints(
        workdir, CheckpointConfig(**config), stages=STAGES, run_config=run_config, data_fingerprint=fingerprint
    )


def make_state(step: int, scale: float = 1.0) -> TrainState:
    weights = jnp.arange(64 * 4, dtype=jnp.float32).reshape(64, 4) * scale
    params = {"vision": {"bias": jnp.full((7,), 0.1, jnp.bfloat16)}, "text": {"kernel": weights}}
    trainable = {"vision": {"bias": False}, "text": {"kernel": True}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(1e-3), trainable))
    opt_state = optimizer.init(params)
    _, opt_state = optimizer.update(jax.tree.map(jnp.ones_like, params), opt_state, params)
    return jax.tree.map(jnp.asarray, TrainState(step=jnp.int32(step), params=params, opt_state=opt_state))


def place(state, devices):
    """The state cut over `devices` where its first axis allows, replicated elsewhere."""
    mesh = Mesh(np.array(devices), ("data",))

    def put(x):
        spec = PartitionSpec("data") if x.ndim and x.shape[0] % len(devices) == 0 else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(put, state)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize(("saved_on", "restored_on"), [(1, 8), (8, 1), (8, 4)])
def test_restores_exactly_onto_another_device_count(tmp_path, saved_on, restored_on):
    state = make_state(3)
    open_checkpoints(tmp_path).save("grpo", 3, place(state, jax.devices()[:saved_on]))
    target = place(jax.tree.map(jnp.zeros_like, state), jax.devices()[:restored_on])
    checkpoints = open_checkpoints(tmp_path)
    restored = checkpoints.restore(checkpoints.latest(), target)
    assert isinstance(restored, TrainState)
    assert_same(restored, state)
    assert len(restored.params["text"]["kernel"].sharding.device_set) == restored_on


def test_abstract_shapes_are_enough_and_params_load_alone(tmp_path):
    state = make_state(1)
    checkpoints = open_checkpoints(tmp_path)
    saved = checkpoints.save("cold_start", 1, state, data_state={"epoch": 2})
    sharding = SingleDeviceSharding(jax.devices()[1])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)
    assert_same(checkpoints.restore(saved, abstract), state)
    assert_same(checkpoints.restore_params(saved, abstract.params), state.params)
    metadata = checkpoints.metadata(saved)
    assert metadata["data_state"] == {"epoch": 2}
    assert metadata["config_sha256"] == config_sha256(RUN_CONFIG)
    assert metadata["packages"]["jax"] == jax.__version__
    with pytest.raises(ValueError, match="no sharding"):
        checkpoints.restore_params(saved, jax.eval_shape(lambda: state.params))


def test_saved_state_survives_donation_when_asynchronous(tmp_path):
    state = make_state(1)
    expected = np.array(state.params["text"]["kernel"])
    checkpoints = open_checkpoints(tmp_path, asynchronous=True)
    checkpoints.save("grpo", 1, state)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 + 5, s), donate_argnums=0)
    jax.block_until_ready(step(state))
    restored = checkpoints.restore(checkpoints.latest(), make_state(0))
    np.testing.assert_array_equal(restored.params["text"]["kernel"], expected)
    checkpoints.close()


def test_keeps_the_last_and_every_nth(tmp_path):
    checkpoints = open_checkpoints(tmp_path, save_every=2, keep_last=2, keep_every=4)
    written = [checkpoints.maybe_save("grpo", step, make_state(step)) for step in range(1, 13)]
    assert [saved.step for saved in written if saved] == [2, 4, 6, 8, 10, 12]
    assert checkpoints.steps("grpo") == [4, 8, 10, 12]


def test_stages_finish_in_order_and_are_found_again(tmp_path):
    checkpoints = open_checkpoints(tmp_path)
    assert checkpoints.latest() is None
    checkpoints.save("pretrain", 5, make_state(5))
    assert checkpoints.finished("pretrain") is None
    checkpoints.finish("pretrain", make_state(5, scale=9.0))  # step 5 is saved already: it is not written twice
    checkpoints.finish("cold_start", make_state(2, scale=3.0))
    again = open_checkpoints(tmp_path)
    assert again.finished("pretrain") == SavedStep("pretrain", 5)
    assert again.finished("grpo") is None
    assert again.latest() == SavedStep("cold_start", 2)
    reference = again.restore_params(again.finished("cold_start"), make_state(0).params)
    assert_same(reference, make_state(2, scale=3.0).params)
    assert_same(again.restore(SavedStep("pretrain", 5), make_state(0)), make_state(5))


def test_final_checkpoint_that_is_gone_is_an_error(tmp_path):
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.finish("pretrain", make_state(5))
    (tmp_path / "checkpoints/pretrain/5").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"finished at step 5.*missing.*finished\.json"):
        open_checkpoints(tmp_path).finished("pretrain")


def test_another_config_is_refused_and_the_keys_are_named(tmp_path):
    open_checkpoints(tmp_path).save("grpo", 1, make_state(1))
    changed = {"seed": 1, "model": {"num_layers": 2, "betas": (0.9, 0.99)}, "metrics": {"wandb": True}, "new": {}}
    other = open_checkpoints(tmp_path, changed)
    with pytest.raises(ValueError, match="seed was 0, is 1") as error:
        other.restore(other.latest(), make_state(0))
    message = str(error.value)
    assert "metrics.wandb was False, is True" in message and "new was 'absent'" in message and "\n" not in message
    assert "model" not in message
    assert_same(other.restore(other.latest(), make_state(0), check_run=False), make_state(1))
    free = open_checkpoints(tmp_path, changed, free_keys=("seed", "metrics", "new"))
    assert_same(free.restore(free.latest(), make_state(0)), make_state(1))
    with pytest.raises(ValueError, match="data set has changed"):
        open_checkpoints(tmp_path, fingerprint="data-2").restore(SavedStep("grpo", 1), make_state(0))


def largest_array_file(folder: pathlib.Path) -> pathlib.Path:
    files = [path for path in folder.rglob("d/*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_is_found_before_anything_is_read(tmp_path, damage):
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save("grpo", 1, make_state(1))
    checkpoints.save("grpo", 2, make_state(2))
    victim = largest_array_file(tmp_path / "checkpoints/grpo/2")
    content = bytearray(victim.read_bytes())
    if damage == "delete":
        victim.unlink()
    elif damage == "truncate":
        victim.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged: .*resume from step 1$") as error:
        checkpoints.restore(checkpoints.latest(), make_state(0))
    assert victim.name in str(error.value)
    assert_same(checkpoints.restore(SavedStep("grpo", 1), make_state(0)), make_state(1))


def test_damaged_lists_are_named(tmp_path):
    checkpoints = open_checkpoints(tmp_path)
    saved = checkpoints.finish("grpo", make_state(1))
    for name in ("1/files.json", "finished.json"):
        path = tmp_path / "checkpoints/grpo" / name
        path.write_text(path.read_text()[:-3])
    with pytest.raises(ValueError, match=r"files\.json is damaged"):
        checkpoints.restore(saved, make_state(0))
    with pytest.raises(ValueError, match=r"finished\.json is damaged"):
        checkpoints.finished("grpo")


def test_missing_step_and_unknown_stage_are_named(tmp_path):
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save("grpo", 4, make_state(4))
    with pytest.raises(ValueError, match=r"grpo/7; complete steps of stage 'grpo': 4"):
        checkpoints.restore(SavedStep("grpo", 7), make_state(0))
    with pytest.raises(ValueError, match="unknown stage 'sft'"):
        checkpoints.save("sft", 1, make_state(1))
    with pytest.raises(ValueError, match="the state counts 1 steps"):
        checkpoints.save("grpo", 5, make_state(1))
    with pytest.raises(ValueError, match="keep_last=1"):
        CheckpointConfig(keep_last=1)


def test_arrays_that_do_not_fit_are_named(tmp_path):
    checkpoints = open_checkpoints(tmp_path)
    saved = checkpoints.save("grpo", 1, make_state(1))
    state = make_state(0)

    def with_text(text):
        return dataclasses.replace(state, params={**state.params, "text": text})

    wrong = {
        r"text/kernel is stored as float32\[64, 4\], wanted as float32\[32, 4\]": {"kernel": jnp.zeros((32, 4))},
        r"wanted as bfloat16\[64, 4\]": {"kernel": jnp.zeros((64, 4), jnp.bfloat16)},
        r"text/extra is stored as nothing": {"kernel": jnp.zeros((64, 4)), "extra": jnp.zeros(3)},
        r"text/kernel is stored as float32\[64, 4\], wanted as nothing": {},
    }
    for message, text in wrong.items():
        with pytest.raises(ValueError, match=message):
            checkpoints.restore(saved, with_text(text))


def test_an_incomplete_step_is_invisible_and_removed_by_the_next_save(tmp_path):
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save("grpo", 1, make_state(1))
    checkpoints.save("grpo", 2, make_state(2))
    (tmp_path / "checkpoints/grpo/2/files.json").unlink()  # as if killed between the rename and the hashes
    torn = tmp_path / "checkpoints/grpo/3.orbax-checkpoint-tmp"
    torn.mkdir()
    resumed = open_checkpoints(tmp_path)
    assert resumed.latest() == SavedStep("grpo", 1)
    assert torn.exists()  # a reader deletes nothing: another process may be writing
    resumed.save("grpo", 2, make_state(2, scale=2.0))
    assert not torn.exists()
    assert_same(resumed.restore(SavedStep("grpo", 2), make_state(0)), make_state(2, scale=2.0))


KILLED_RUN = """
import sys, jax, jax.numpy as jnp
from safegrpo_jax.checkpoint import CheckpointConfig, Checkpoints
from safegrpo_jax.types import TrainState
checkpoints = Checkpoints(sys.argv[1], CheckpointConfig(), stages=("grpo",), run_config={}, data_fingerprint="")
for step in range(1, 10000):
    params = {"w": jnp.full((1000, 1000), step, jnp.float32)}
    state = jax.tree.map(jnp.asarray, TrainState(step=jnp.int32(step), params=params, opt_state=()))
    checkpoints.save("grpo", step, state)
    print(step, flush=True)
"""


@pytest.mark.parametrize("delay_seconds", [0.0, 0.07])
def test_a_run_killed_while_saving_leaves_only_whole_checkpoints(tmp_path, delay_seconds):
    root = pathlib.Path(__file__).parent.parent
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED_RUN, str(tmp_path)], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    for _ in range(2):
        child.stdout.readline()
    time.sleep(delay_seconds)
    child.send_signal(signal.SIGKILL)
    printed = child.communicate()[0].split()
    last_printed = int(printed[-1]) if printed else 2
    config = CheckpointConfig()
    checkpoints = Checkpoints(tmp_path, config, stages=("grpo",), run_config={}, data_fingerprint="")
    saved = checkpoints.latest()
    assert saved.step in (last_printed, last_printed + 1)
    target = TrainState(step=jnp.int32(0), params={"w": jnp.zeros((1000, 1000))}, opt_state=())
    target = jax.tree.map(jnp.asarray, target)
    restored = checkpoints.restore(saved, target)
    assert int(restored.step) == saved.step
    np.testing.assert_array_equal(restored.params["w"], np.full((1000, 1000), saved.step, np.float32))
