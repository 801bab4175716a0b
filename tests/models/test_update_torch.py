"""Whole GRPO updates of a tiny Qwen3-VL with images against the same updates in torch.

The torch side is written from the formulas: transformers' model, torch autograd, torch's gradient clipping and AdamW.
"""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwen_tiny import END, GRIDS, IMAGE, START, build_prompts, pack_images, tiny_config, torch_model

from safegrpo_jax.grpo.loss import LossConfig
from safegrpo_jax.grpo.optimizer import OptimizerConfig, make_optimizer
from safegrpo_jax.grpo.update import UpdateConfig, update_policy
from safegrpo_jax.models import hf_weights
from safegrpo_jax.policy import make_logps_fn
from safegrpo_jax.types import Experience, TrainState

torch = pytest.importorskip("torch")

B, G, C, TEMPERATURE = 4, 2, 6, 0.8
NUM_UPDATES, NUM_MINIBATCHES = 3, 2
LOSS = LossConfig(kl_coefficient=0.1)
# A large epsilon: Adam divides a rounding error by the rounding error's own size otherwise.
OPTIMIZER = OptimizerConfig(learning_rate=3e-4, epsilon=1e-4, weight_decay=0.01, clip_norm=1.0)
SAME_PARAMETERS = 1e-5  # absolute, after six optimizer steps of up to 3e-4 each
MOVED = 5e-4  # what six steps do at least, somewhere
QUICK = {"xla_backend_optimization_level": 0}  # most of this test is compilation
BANNED = np.isin(np.arange(100), [IMAGE, START, END])
IMAGES_OF_BLOCKS = ([(4, 6), (2, 4)], [(6, 2)])  # grids; one per prompt that has an image


def make_prompts():
    """Prompts 0 and 1 with the images of packing row 0, 2 with that of row 1, 3 without; left-padded."""
    rows = [
        [5, START, (0, 0), END, 7, 8],
        [21, 22, 23, START, (0, 1), END, 24],
        [11, START, (1, 0), END, 12, 13, 14],
        [31, 32, 33, 34, 35],
    ]
    return build_prompts(rows, pack_images(GRIDS, row_len=32, seed=4), GRIDS, length=14)


def make_completions(seed):
    rng = np.random.default_rng(seed)
    mask = np.arange(C) < rng.integers(2, C + 1, (B * G, 1))
    return rng.integers(1, 80, (B * G, C)).astype(np.int32), mask


class TorchUpdates:
    """The policy of the torch side and its optimizer."""

    def __init__(self, model):
        self.model, self.reference = model, copy.deepcopy(model)
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=OPTIMIZER.learning_rate,
            betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
            eps=OPTIMIZER.epsilon,
            weight_decay=OPTIMIZER.weight_decay,
        )

    def logps(self, model, prompts, ids, mask, block):
        """Log-probabilities of the completions of one mini-batch, images once per rollout as transformers wants."""
        prompt = np.arange(block * B // 2, (block + 1) * B // 2).repeat(G)
        tokens = torch.from_numpy(np.concatenate([prompts.prompt_ids[prompt], ids], 1)).long()
        real = prompts.images.patches[block], prompts.images.segment_ids[block]
        grids = IMAGES_OF_BLOCKS[block]
        numbers = [number for number in range(len(grids)) for _ in range(G)]
        output = model(
            input_ids=tokens,
            attention_mask=torch.from_numpy(np.concatenate([prompts.prompt_mask[prompt], mask], 1)).long(),
            pixel_values=torch.from_numpy(np.concatenate([real[0][real[1] == number + 1] for number in numbers])),
            image_grid_thw=torch.tensor([(1, *grids[number]) for number in numbers]),
            mm_token_type_ids=(tokens == IMAGE).int(),
        )
        logits = output.logits[:, prompts.prompt_ids.shape[1] - 1 : -1] / TEMPERATURE
        logits = logits.masked_fill(torch.from_numpy(BANNED), -torch.inf)
        return logits.log_softmax(-1).gather(-1, torch.from_numpy(ids).long()[..., None])[..., 0]

    def update(self, prompts, ids, mask, behavior_logps, advantages):
        for block in range(NUM_MINIBATCHES):
            rows = slice(block * B * G // 2, (block + 1) * B * G // 2)
            part, real = (prompts, ids[rows], mask[rows], block), torch.from_numpy(mask[rows])
            logps = self.logps(self.model, *part)
            with torch.no_grad():
                reference = self.logps(self.reference, *part)
            advantage = torch.from_numpy(advantages[rows])
            ratio = (logps - torch.from_numpy(behavior_logps[rows])).exp()
            loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
            loss = torch.where(advantage < 0, torch.minimum(loss, -3.0 * advantage), loss)
            away = reference - logps
            loss = loss + LOSS.kl_coefficient * (away.exp() - away - 1).clamp(max=10.0)
            self.optimizer.zero_grad()
            (loss[real].sum() / real.sum()).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER.clip_norm)
            self.optimizer.step()


def saved_params(model, config, folder):
    model.save_pretrained(folder)
    return hf_weights.load(folder, config)


def test_three_updates_of_two_minibatches_equal_those_of_torch(tmp_path):
    config = tiny_config(scan_layers=True)
    torch_side = TorchUpdates(torch_model(config))
    reference = saved_params(torch_side.model, config, tmp_path / "start")
    logps_fn = make_logps_fn(config, BANNED, TEMPERATURE, chunk=0, freeze_vision=False)
    optimizer = make_optimizer(OPTIMIZER, None)
    prompts, state = make_prompts(), TrainState(jnp.int32(0), reference, optimizer.init(reference))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def update(state, reference, prompts, ids, mask, behavior_logps, advantages):
        reference_logps, _ = logps_fn(reference, prompts, ids, mask)
        experience = Experience(prompts, ids, mask, behavior_logps, behavior_logps, reference_logps, advantages)
        settings = UpdateConfig(num_minibatches=NUM_MINIBATCHES)
        return update_policy(
            state, experience, None, logps_fn=logps_fn, optimizer=optimizer, loss=LOSS, update=settings
        )

    policy_logps_of = jax.jit(logps_fn, compiler_options=QUICK)
    clipped = 0.0
    for step in range(NUM_UPDATES):
        ids, mask = make_completions(step)
        rng = np.random.default_rng(10 + step)
        policy_logps = np.asarray(policy_logps_of(state.params, prompts, ids, mask)[0])
        behavior_logps = np.where(mask, policy_logps + rng.normal(0, 0.2, mask.shape), 0).astype(np.float32)
        advantages = np.where(mask, rng.normal(size=(B * G, 1)), 0).astype(np.float32)
        state, metrics = update(state, reference, prompts, ids, mask, behavior_logps, advantages)
        torch_side.update(prompts, ids, mask, behavior_logps, advantages)
        clipped += float(metrics["policy/clip_fraction"])
        assert metrics["update/grad_norm"] > OPTIMIZER.clip_norm, "the case must clip the gradient"
    assert clipped > 0 and metrics["policy/kl"] > 0, "the case must exercise clip and KL"
    expected = saved_params(torch_side.model, config, tmp_path / "end")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=SAME_PARAMETERS, rtol=0), state.params, expected)
    for tower in ("vision", "text"):
        moves = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), state.params[tower], reference[tower])
        assert max(jax.tree.leaves(moves)) > MOVED, tower
