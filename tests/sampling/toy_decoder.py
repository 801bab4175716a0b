"""A one-layer attention model with the real cache contract, and the same model without a cache as its oracle."""

import jax
import jax.numpy as jnp
import numpy as np

from safegrpo_jax.rewards.automaton import build_tables
from safegrpo_jax.sampling.cache import take_sharded
from safegrpo_jax.sampling.decode import ModelFunctions
from safegrpo_jax.types import Labels, PackedImages, Prompts

END, VISION = 1, 2  # special tokens: the stop token and one that must never be drawn
PIECES = (
    [b"", b"", b""]
    + [b"<visual_safe>safe</visual_safe>", b"<visual_safe>unsafe</visual_safe>", b"<text_safe>safe</text_safe>"]
    + [
        b"<text_safe>",
        b"</text_safe>",
        b"<combined_safe>unsafe</combined_safe>",
        b"</think>",
        b"<answer>",
        b"</answer>",
    ]
    + [b"Sorry", b" unsafe", b" sure", b"\n"]
)
VOCAB, WIDTH, HEADS, KV_HEADS, HEAD_DIM, PROMPT_LEN = len(PIECES), 12, 4, 2, 6, 7
BANNED = np.arange(VOCAB) == VISION


def reward_tables():
    return build_tables("reference", PIECES)


def init_params(seed=0, end_bias=0.0):
    keys = jax.random.split(jax.random.key(seed), 6)
    shapes = {
        "embedding": (VOCAB, WIDTH),
        "query": (WIDTH, HEADS, HEAD_DIM),
        "key": (WIDTH, KV_HEADS, HEAD_DIM),
        "value": (WIDTH, KV_HEADS, HEAD_DIM),
        "out": (HEADS, HEAD_DIM, WIDTH),
        "head": (WIDTH, VOCAB),
    }
    params = {name: 0.4 * jax.random.normal(key, shapes[name]) for name, key in zip(shapes, keys, strict=True)}
    return params | {"bias": jnp.zeros(VOCAB).at[END].set(end_bias)}


def _embed(params, ids, positions):
    wave = jnp.sin(positions[..., None] * (1.0 + jnp.arange(WIDTH)) / WIDTH)
    return params["embedding"][ids] + wave


def _keys_values(params, x):
    keys = jnp.einsum("...td,dke->...kte", x, params["key"])
    return keys, jnp.einsum("...td,dke->...kte", x, params["value"])


def _attend(params, x, keys, values, visible):
    """x [n t d], keys and values [n k s e], visible [n t s] -> hidden [n t d]."""
    queries = jnp.einsum("ntd,dhe->nhte", x, params["query"])
    keys, values = (jnp.repeat(part, HEADS // KV_HEADS, axis=1) for part in (keys, values))
    scores = jnp.einsum("nhte,nhse->nhts", queries, keys) / HEAD_DIM**0.5
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -1e30), axis=-1)
    return jnp.tanh(x + jnp.einsum("nhts,nhse,hed->ntd", weights, values, params["out"]))


def full_hidden(params, ids, mask, positions):
    """Hidden states [n t d] of whole sequences, no cache."""
    x = _embed(params, ids, positions)
    causal = jnp.tril(jnp.ones((ids.shape[1],) * 2, bool))
    return _attend(params, x, *_keys_values(params, x), causal & mask[:, None, :])


def logits(params, hidden):
    return hidden @ params["head"] + params["bias"]


def _prefill(params, prompts, features):
    x = _embed(params, prompts.prompt_ids, prompts.positions[0])
    keys, values = _keys_values(params, x)
    hidden = full_hidden(params, prompts.prompt_ids, prompts.prompt_mask, prompts.positions[0])
    return hidden[:, -1], (keys,), (values,)


def _decode(params, unpacked, token_ids, positions, view, cache):
    """Repeats each slot's prefix and takes its private columns by their age: the plainest reading of `CacheView`."""
    x = _embed(params, token_ids, positions)[:, None]
    private = (
        jax.lax.dynamic_update_slice_in_dim(old, new, view.column, axis=2)
        for old, new in zip(
            (cache.private_keys[0].swapaxes(2, 3), cache.private_values[0]), _keys_values(params, x), strict=True
        )
    )
    private_keys, private_values = private
    num_shards, num_seats = view.slot_of_seat.shape
    prefix = view.seat_of_slot * (len(cache.prefix_mask) // num_shards) // num_seats
    age = (view.column - jnp.arange(private_keys.shape[2])) % private_keys.shape[2]
    hidden = _attend(
        params,
        x,
        jnp.concatenate([take_sharded(cache.prefix_keys[0], prefix).swapaxes(2, 3), private_keys], axis=2),
        jnp.concatenate([take_sharded(cache.prefix_values[0], prefix), private_values], axis=2),
        jnp.concatenate([take_sharded(cache.prefix_mask, prefix), age < view.private_len[:, None]], axis=1)[:, None],
    )[:, 0]
    cache = type(cache)(
        cache.prefix_keys, cache.prefix_values, cache.prefix_mask, (private_keys.swapaxes(2, 3),), (private_values,)
    )
    return hidden, cache


def _encode(params, prompts):
    return jnp.zeros(())


FUNCTIONS = ModelFunctions(encode=_encode, prefill=_prefill, unpack=lambda params: None, decode=_decode, logits=logits)


def make_prompts(record_ids, prompt_len=PROMPT_LEN, with_rope_delta=True):
    """Prompts whose content is a function of the record id alone, left-padded, 3 to 6 tokens long."""
    record_ids = np.asarray(record_ids, np.int32)
    num_prompts = len(record_ids)
    lengths = 3 + record_ids % 4
    mask = np.arange(prompt_len) >= prompt_len - lengths[:, None]
    ids = np.zeros((num_prompts, prompt_len), np.int32)
    for row, record in enumerate(record_ids):
        draws = np.random.default_rng(record).integers(3, VOCAB, lengths[row])
        ids[row, prompt_len - lengths[row] :] = draws
    positions = np.where(mask, np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)
    zeros = np.zeros(num_prompts, np.int32)
    return Prompts(
        prompt_ids=ids,
        prompt_mask=mask,
        positions=np.broadcast_to(positions, (3, *positions.shape)).copy(),
        rope_delta=(-(record_ids % 2) if with_rope_delta else zeros).astype(np.int32),
        vision_mask=np.zeros_like(mask),
        feature_index=np.zeros_like(ids),
        record_ids=record_ids,
        images=PackedImages(
            patches=np.zeros((num_prompts, 4, 2), np.float32),
            patch_pos=np.zeros((num_prompts, 4, 2), np.int32),
            tap_ids=np.zeros((num_prompts, 4, 4), np.int32),
            tap_weights=np.zeros((num_prompts, 4, 4), np.float32),
            segment_ids=np.zeros((num_prompts, 4), np.int32),
        ),
        labels=Labels(visual=zeros, text=zeros, combined=zeros, tagged=zeros == 0),
    )


def recompute_logits(params, prompts, completion_ids, completion_mask):
    """Logits [n c v] that produced each completion token, from whole sequences without a cache."""
    group = completion_ids.shape[0] // prompts.prompt_ids.shape[0]
    num_completion = completion_ids.shape[1]
    ids = np.concatenate([np.repeat(prompts.prompt_ids, group, axis=0), completion_ids], axis=1)
    mask = np.concatenate([np.repeat(prompts.prompt_mask, group, axis=0), completion_mask], axis=1)
    start = np.repeat(prompts.prompt_mask.sum(1) + prompts.rope_delta, group)[:, None]
    positions = np.concatenate(
        [np.repeat(prompts.positions[0], group, axis=0), start + np.arange(num_completion)], axis=1
    )
    hidden = full_hidden(params, jnp.asarray(ids), jnp.asarray(mask), jnp.asarray(positions))
    return np.asarray(logits(params, hidden[:, -num_completion - 1 : -1]), np.float64)
