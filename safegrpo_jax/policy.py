"""The policy as functions: what sampling, scoring and updates ask of a Qwen-VL, bound to its config.

Here token rows are put together: a completion behind its padded prompt, or many rollouts in one packed row, by the
index arrays of a `Packing`. Log-probabilities come back per rollout either way, so the objective never sees a row.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Int

from safegrpo_jax.grpo.logps import token_logps
from safegrpo_jax.models import qwen_vl
from safegrpo_jax.models.qwen_vl import QwenVLConfig
from safegrpo_jax.sampling.decode import ModelFunctions
from safegrpo_jax.types import PATCHES_PER_FEATURE, Array, Packing, Prompts


def model_functions(model: QwenVLConfig) -> ModelFunctions:
    """The functions that sampling needs, bound to one model config."""
    return ModelFunctions(
        encode=lambda params, prompts: qwen_vl.encode_images(params, prompts.images, model),
        prefill=lambda params, prompts, features: qwen_vl.prefill(params, prompts, features, model),
        unpack=lambda params: qwen_vl.decode_blocks(params, model),
        decode=lambda params, blocks, token_ids, positions, view, cache: qwen_vl.decode_hidden(
            params, token_ids, positions, view, cache, model, blocks
        ),
        logits=lambda params, hidden: qwen_vl.logits_from_hidden(params, hidden, model),
    )


def make_logps_fn(
    model: QwenVLConfig,
    banned_ids_mask: Bool[Array, "v"],
    temperature: float,
    chunk: int,
    freeze_vision: bool,
    share_prompts: bool = False,
    batch_axes: tuple[str, ...] = (),
) -> Callable:
    """`logps_fn(params, prompts, completion_ids [n c], completion_mask [n c]) -> (logps [n c], entropy [n c])`.

    Row r of the completions continues prompt r // (n // b). Images are encoded once per prompt. With
    `freeze_vision` no gradient reaches the vision tower. With one block of a `Packing` as fifth argument the model runs
    on packed rows, spread over `batch_axes`, and the results are those of the block's rollouts, [members c].
    With `share_prompts` a prompt is computed once for all of its completions, or as the packing was made.
    """

    def score(params, states, target_ids, mask):
        logits_fn = lambda hidden: qwen_vl.logits_from_hidden(params, hidden, model)  # noqa: E731
        return token_logps(logits_fn, states, target_ids, mask, banned_ids_mask, temperature, chunk)

    def encode(params, images):
        features = qwen_vl.encode_images(params, images, model)
        return jax.lax.stop_gradient(features) if freeze_vision else features

    def padded(params, prompts, completion_ids, completion_mask):
        features = encode(params, prompts.images)
        rows = _join(prompts, completion_ids, completion_mask)
        hidden = qwen_vl.text_hidden(params, *rows, features, model)
        # The hidden state at token t predicts token t + 1.
        prompt_len = prompts.prompt_ids.shape[1]
        return score(params, hidden[:, prompt_len - 1 : -1], completion_ids, completion_mask)

    def shared(params, prompts, completion_ids, completion_mask):
        features = encode(params, prompts.images)
        group = completion_ids.shape[0] // prompts.prompt_ids.shape[0]
        positions = _completion_positions(prompts, completion_ids)
        tokens = (completion_ids, completion_mask, positions)
        last, hidden = qwen_vl.continuation_hidden(params, prompts, features, *tokens, model)
        states = jnp.concatenate([jnp.repeat(last, group, 0)[:, None], hidden[:, :-1]], 1)
        return score(params, states, completion_ids, completion_mask)

    def packed(params, prompts, completion_ids, completion_mask, block):
        def spread(x, axis=0):
            return jax.lax.with_sharding_constraint(x, PartitionSpec(*[None] * axis, batch_axes)) if batch_axes else x

        features = encode(params, jax.tree.map(lambda x: spread(x[block.image_rows]), prompts.images))
        token_ids, positions, vision_mask, feature_index = _gather_rows(prompts, completion_ids, block)
        token_ids, vision_mask, feature_index = map(spread, (token_ids, vision_mask, feature_index))
        hidden = qwen_vl.text_hidden(
            params,
            token_ids,
            spread(block.segment_ids),
            spread(positions, 1),
            vision_mask,
            feature_index,
            features,
            model,
            spread(block.prefix_ids) if share_prompts else None,
        )
        states = jnp.take_along_axis(hidden, block.state_place[..., None], 1)
        target_ids = jnp.take_along_axis(token_ids, block.answer_place, 1)
        values = score(params, states, target_ids, block.answer_mask)
        mask = completion_mask[block.rollouts] & block.rollout_mask[:, None]
        place = jnp.where(mask, block.first_answer[:, None] + jnp.arange(mask.shape[1]), 0)
        return tuple(jnp.where(mask, value.reshape(-1)[place], 0.0) for value in values)

    def logps_fn(params, prompts, completion_ids, completion_mask, block: Packing | None = None):
        if block is not None:
            return packed(params, prompts, completion_ids, completion_mask, block)
        return (shared if share_prompts else padded)(params, prompts, completion_ids, completion_mask)

    return logps_fn


def _join(prompts: Prompts, completion_ids: Int[Array, "n c"], completion_mask: Bool[Array, "n c"]):
    """Token rows of prompt + completion: ids, mask, positions [3 n t], vision mask, feature index."""
    group = completion_ids.shape[0] // prompts.prompt_ids.shape[0]

    def repeat(x, axis=0):
        return jnp.repeat(x, group, axis=axis)

    completion_pos = _completion_positions(prompts, completion_ids)
    no_vision = jnp.zeros_like(completion_ids)
    return (
        jnp.concatenate([repeat(prompts.prompt_ids), completion_ids], 1),
        jnp.concatenate([repeat(prompts.prompt_mask), completion_mask], 1),
        jnp.concatenate(
            [repeat(prompts.positions, 1), jnp.broadcast_to(completion_pos, (3, *completion_pos.shape))], 2
        ),
        jnp.concatenate([repeat(prompts.vision_mask), no_vision.astype(bool)], 1),
        jnp.concatenate([repeat(prompts.feature_index), no_vision], 1),
    )


def _gather_rows(prompts: Prompts, completion_ids: Int[Array, "n c"], block: Packing):
    """Packed token rows: ids, positions [3 rows t], vision mask, feature index into the block's images."""
    width, group = prompts.prompt_ids.shape[1], completion_ids.shape[0] // prompts.prompt_ids.shape[0]
    prompt, in_prompt = block.rollout // group, block.column < width
    prompt_place = (prompt, jnp.where(in_prompt, block.column, 0))
    number = jnp.where(in_prompt, 0, block.column - width)
    features_per_row = prompts.images.segment_ids.shape[1] // PATCHES_PER_FEATURE
    image_row, feature = jnp.divmod(prompts.feature_index[prompt_place], features_per_row)
    vision_mask = prompts.vision_mask[prompt_place] & in_prompt & (block.segment_ids > 0)
    return (
        jnp.where(in_prompt, prompts.prompt_ids[prompt_place], completion_ids[block.rollout, number]),
        jnp.where(in_prompt, prompts.positions[:, *prompt_place], _first_position(prompts)[prompt] + number),
        vision_mask,
        jnp.where(vision_mask, block.image_slots[image_row] * features_per_row + feature, 0),
    )


def _completion_positions(prompts: Prompts, completion_ids: Int[Array, "n c"]) -> Int[Array, "n c"]:
    num_rows, length = completion_ids.shape
    first = jnp.repeat(_first_position(prompts), num_rows // prompts.prompt_ids.shape[0])
    return first[:, None] + jnp.arange(length, dtype=jnp.int32)


def _first_position(prompts: Prompts) -> Int[Array, "b"]:
    """The M-RoPE position of the first completion token, equal on all axes."""
    return prompts.prompt_mask.sum(-1, dtype=jnp.int32) + prompts.rope_delta
