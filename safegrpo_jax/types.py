"""The pytrees that flow through the trainer, and THE axis legend.

Every array in the package is annotated with these letters; the same letters are used in
einsum strings and comments.

    b  prompts                      v  vocabulary
    g  samples per prompt (group)   d  width (hidden size)
    n  rollouts, n = b * g          h  query heads
    p  prompt tokens (left-padded)  k  key/value heads
    c  completion tokens            e  head dimension
    t  tokens of a row, t = p + c   f  mlp width
    s  private cache columns        l  layers
    u  packing rows of patches      x  values in one vision patch
    i  patches in a packing row     m  merged vision tokens, all packing rows: m = u * i / 4
    q  tags (visual, text, combined)
    r  rules                        z  shards of a batch: data-parallel parts

Rollout row r belongs to prompt r // g. Suffixes: `*_ids` int32 tokens, `*_mask` bool (True = real),
`*_pos` positions, `*_len` counts, `*_logps` natural logarithms, `*_key` PRNG keys.

Nothing here computes; nothing here imports another module of the package.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Num

Array = jax.Array | np.ndarray  # the host builds numpy arrays; programs turn them into jax arrays
Params = Any  # a nested dict of arrays; only models/ knows what is inside
ArrayTree = Any

_T = TypeVar("_T")


@dataclass_transform(frozen_default=True)
def pytree(cls: type[_T]) -> type[_T]:
    """Makes `cls` a frozen dataclass whose fields are pytree children. Change fields with `dataclasses.replace`.

    Unflattening skips `__init__`: jax puts shapes, shardings and None where arrays were, which the
    run-time checks of the tests would refuse.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    names = tuple(field.name for field in dataclasses.fields(cls))

    def flatten(instance):
        return tuple((jax.tree_util.GetAttrKey(name), getattr(instance, name)) for name in names), None

    def unflatten(_, children):
        instance = object.__new__(cls)
        for name, child in zip(names, children, strict=True):
            object.__setattr__(instance, name, child)
        return instance

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls


PATCHES_PER_FEATURE = 4  # a merged vision token covers 2 x 2 patches, consecutive in their packing row
SAFE, UNSAFE = 0, 1  # label values
VERDICT_NONE, VERDICT_SAFE, VERDICT_UNSAFE, VERDICT_OTHER = 0, 1, 2, 3


@pytree
class PackedImages:
    """Patches of all images of a batch, packed into `u` rows of `i` patches.

    An image never crosses a row. Within an image, patches are in merge-block order (four consecutive
    patches make one merged token). `segment_ids` is 0 for padding and 1, 2, ... for the images of a row.
    """

    patches: Float[Array, "u i x"]
    patch_pos: Int[Array, "u i 2"]  # (row, column) of the patch in its image
    tap_ids: Int[Array, "u i 4"]  # rows of the learned position table
    tap_weights: Float[Array, "u i 4"]  # bilinear weights, float32
    segment_ids: Int[Array, "u i"]


@pytree
class VisionFeatures:
    """Merged vision tokens in packing order: what the text decoder splices in."""

    main: Float[Array, "m d"]
    deepstack: Float[Array, "taps m d"]


@pytree
class Labels:
    """Ground truth of each prompt.

    `visual`, `text`, `combined` are SAFE or UNSAFE. `tagged` is False for rows whose reward is not
    the safety reward (plain questions), whose labels are then meaningless. `gold_answer` is 1 + the index of the
    right one among the answers that the reward lists, 0 for rows without; None where the reward lists none.
    """

    visual: Int[Array, "b"]
    text: Int[Array, "b"]
    combined: Int[Array, "b"]
    tagged: Bool[Array, "b"]
    gold_answer: Int[Array, "b"] | None = None


@pytree
class Prompts:
    """A batch of tokenized prompts with their images.

    Prompts are left-padded to one length. `feature_index[b, p]` is the row of `VisionFeatures` to use
    where `vision_mask` is True, and 0 elsewhere. `positions` are M-RoPE positions on the axes (time, height, width).
    A generated token number c (0-based) of prompt b sits at position
    `prompt_mask[b].sum() + rope_delta[b] + c` on all three axes.
    """

    prompt_ids: Int[Array, "b p"]
    prompt_mask: Bool[Array, "b p"]
    positions: Int[Array, "3 b p"]
    rope_delta: Int[Array, "b"]
    vision_mask: Bool[Array, "b p"]
    feature_index: Int[Array, "b p"]
    record_ids: Int[Array, "b"]  # index of the record in its data set; keys the sampling noise
    images: PackedImages
    labels: Labels


@pytree
class KVCache:
    """Keys and values for decoding: prefixes once per prompt, private tokens once per decode slot.

    Tuples hold one buffer per layer. Head-major layout keeps the tokens of one head contiguous; those of the keys lie
    last, for scores contract over e: a CPU reads them twice as fast, a TPU alike. The private columns
    are a ring: a step writes one column for all slots, and a slot reads the newest ones, as many as are its own.
    """

    prefix_keys: tuple[Float[Array, "b k e p"], ...]
    prefix_values: tuple[Float[Array, "b k p e"], ...]
    prefix_mask: Bool[Array, "b p"]
    private_keys: tuple[Float[Array, "n k e s"], ...]
    private_values: tuple[Float[Array, "n k s e"], ...]


@pytree
class CacheView:
    """What each of n decode slots reads and writes of a `KVCache` in one step.

    Slots and prefixes form z equal, contiguous shards, and the two maps count within a shard. Every prefix has g seats,
    one for each sample of its prompt; a slot sits on seat prefix * g + sample. A seat without a slot may name any slot.
    `column` is written in this step; `private_len` counts the columns that a slot reads, this one included.
    """

    column: Int[Array, ""]
    private_len: Int[Array, "n"]
    seat_of_slot: Int[Array, "z slots"]
    slot_of_seat: Int[Array, "z seats"]


@pytree
class TagSpans:
    """What the reward automata found in each completion; token indices count from the completion's start.

    `verdict` is one of VERDICT_*: of the first occurrence of each tag, in the order visual, text,
    combined. Starts are inclusive, ends exclusive, both -1 where nothing was found.
    """

    gate: Bool[Array, "n"]
    verdict: Int[Array, "n 3"]
    tag_start: Int[Array, "n 3"]
    tag_end: Int[Array, "n 3"]
    tag_count: Int[Array, "n 3"]
    answer_start: Int[Array, "n"]
    answer_end: Int[Array, "n"]
    answered: Bool[Array, "n"]
    refusal: Bool[Array, "n"]  # the answer exists and holds a refusal
    answer_len: Int[Array, "n"]  # tokens strictly inside the answer markers, 0 if none
    added_outcomes: Int[Array, "n added"]  # labels of the machines that the config adds, see `build_machines`


@pytree
class Rewards:
    """Total reward of each rollout and the value of every rule, by name, each in [0, 1].

    The total is in [0, 1] too, unless a length penalty is subtracted from it.
    """

    total: Float[Array, "n"]
    rules: dict[str, Float[Array, "n"]]


@pytree
class Rollouts:
    """Sampled completions. `completion_mask` covers the sampled tokens, the end token included.

    `behavior_logps` are log-probabilities under the temperature-scaled softmax without the banned
    ids, not renormalised by top-k or top-p; 0 where masked. `truncated`: ended by length, not by an end token.
    """

    completion_ids: Int[Array, "n c"]
    completion_mask: Bool[Array, "n c"]
    behavior_logps: Float[Array, "n c"]
    completion_len: Int[Array, "n"]
    truncated: Bool[Array, "n"]
    spans: TagSpans


@pytree
class Packing:
    """Where each token of the rollouts of a batch goes in rows without padding: index arrays alone.

    A block is a microbatch: `rows` rows of t tokens, the images they need, and the rollouts in them. The blocks of a
    mini-batch follow each other; within them rollouts, packing rows of images and places are counted from the start of
    the mini-batch, and columns along prompt + completion. `segment_ids` is 0 for padding. A token sees the earlier
    tokens of its own segment and of the segment `prefix_ids`, which differ where responses share one prompt.
    `state_place` is the token in the row whose hidden state predicts an answer token, `answer_place` that token.
    `first_answer` is the place of a rollout's first answer token in the flattened `answers` of its block.
    """

    rollout: Int[Array, "blocks rows t"]
    column: Int[Array, "blocks rows t"]
    segment_ids: Int[Array, "blocks rows t"]
    prefix_ids: Int[Array, "blocks rows t"]
    state_place: Int[Array, "blocks rows answers"]
    answer_place: Int[Array, "blocks rows answers"]
    answer_mask: Bool[Array, "blocks rows answers"]
    image_rows: Int[Array, "blocks used"]
    image_slots: Int[Array, "blocks u"]  # the inverse: place in `image_rows`, 0 where not used
    rollouts: Int[Array, "blocks members"]
    rollout_mask: Bool[Array, "blocks members"]
    first_answer: Int[Array, "blocks members"]


@pytree
class Experience:
    """Everything one policy update needs: prompts, rollouts, and what was computed about them.

    `proximal_logps` are the trainer's own log-probabilities before the first update, or, where the loss does not ask
    for them, those of sampling once more.
    """

    prompts: Prompts
    completion_ids: Int[Array, "n c"]
    completion_mask: Bool[Array, "n c"]
    behavior_logps: Float[Array, "n c"]
    proximal_logps: Float[Array, "n c"]
    reference_logps: Float[Array, "n c"]
    advantages: Float[Array, "n c"]


@pytree
class Demonstrations:
    """Prompts with the completion to imitate, one per prompt, right-padded."""

    prompts: Prompts
    completion_ids: Int[Array, "b c"]
    completion_mask: Bool[Array, "b c"]


@pytree
class TrainState:
    """Trainable state. `step` counts finished outer steps (a rollout batch, or a supervised batch).

    `skipped_in_row`: optimizer steps skipped for a broken gradient since the last good one. `kl_coefficient`: the
    factor of the KL term where it adapts to a target, else unread.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: ArrayTree
    skipped_in_row: Int[Array, ""] = dataclasses.field(default_factory=lambda: np.zeros((), np.int32))
    kl_coefficient: Float[Array, ""] = dataclasses.field(default_factory=lambda: np.zeros((), np.float32))


Metrics = dict[str, Num[Array, ""]]
Key = jax.Array
