"""Who may look at (attend to) whom.

PaliGemma is a prefix language model. Image and prompt (token type 0, the *prefix*) see each other completely; the
answer (type 1, the *suffix*) is causal: it sees the whole prefix and the answer so far. The prefix never sees the
answer: that would leak the labels in training. A row is one prefix, then one suffix.

A row is a query (who looks), a column a key (who is looked at); `i` image, `p` prompt, `s` suffix:

        i i p p s s s
    i   1 1 1 1 0 0 0
    i   1 1 1 1 0 0 0
    p   1 1 1 1 0 0 0
    p   1 1 1 1 0 0 0
    s   1 1 1 1 1 0 0
    s   1 1 1 1 1 1 0
    s   1 1 1 1 1 1 1

Two more rules lie on top:

No token attends to *padding*. (A padding position attends to itself, so that its softmax has something to sum over.
What it computes is never used, as long as it is a finite number.) One pad `.` on the left:

        . i p s s
    .   1 0 0 0 0
    i   0 1 1 0 0
    p   0 1 1 0 0
    s   0 1 1 1 0
    s   0 1 1 1 1

*Sliding window* (every other layer of Gemma 2): a token attends to itself and the `window` - 1 positions before it. The
prefix block ignores the window, as in transformers (the reference, big_vision, has no window at all): inside it every
token still attends to every other. The suffix keeps to it: at 896 pixels an image has 4096 tokens, so the first ones
fall out of a window of 4096. With a window of 3:

        i i p p s s s
    i   1 1 1 1 0 0 0
    i   1 1 1 1 0 0 0
    p   1 1 1 1 0 0 0
    p   1 1 1 1 0 0 0
    s   0 0 1 1 1 0 0
    s   0 0 0 1 1 1 0
    s   0 0 0 0 1 1 1

Masks are boolean, True where looking is allowed, and shaped [B, 1, S, T] to broadcast over the heads.

Letters: B batch, S queries, T keys.

The tests read these drawings and compare them with what the functions return.
"""

from __future__ import annotations

import torch
from torch import Tensor

PREFIX, SUFFIX = 0, 1  # the two token types


def prefix_lm_mask(token_type_ids: Tensor, valid: Tensor, window: int | None = None) -> Tensor:
    """The mask of whole rows: prefix, and suffix if there is one.

    token_type_ids: int64 [B, S], 0 prefix and padding, 1 suffix. valid: bool [B, S], False on padding.
    Returns bool [B, 1, S, S]. The picture at the head of this file shows it.
    """
    position = positions(valid)
    allowed = _causal(position, position, window)
    in_prefix = (token_type_ids == PREFIX) & valid
    allowed |= in_prefix[:, :, None] & in_prefix[:, None, :]
    allowed &= valid[:, :, None] & valid[:, None, :]
    allowed |= torch.diag_embed(~valid)  # padding sees itself
    return allowed[:, None]  # [B, 1, S, S]


def cached_mask(query_positions: Tensor, key_positions: Tensor, key_valid: Tensor, window: int | None = None) -> Tensor:
    """The mask of tokens that continue a cached row: they are suffix, so causal over everything stored.

    query_positions: int64 [B, S]; key_positions: int64 [B, T]; key_valid: bool [B, T], both as the cache keeps them.
    The queries are the last S of the keys. (In a `StaticKVCache` they may stand in any column. There every key is
    valid, so it makes no difference which ones are looked at.) Returns bool [B, 1, S, T].
    """
    S = query_positions.shape[1]
    valid = key_valid[:, -S:]
    allowed = _causal(query_positions, key_positions, window)
    allowed &= valid[:, :, None] & key_valid[:, None, :]
    allowed[:, :, -S:] |= torch.diag_embed(~valid)  # padding sees itself
    return allowed[:, None]  # [B, 1, S, T]


def windowed(mask: Tensor, query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """For `forward(mask=...)`: the caller's mask, bool [B, 1, S, T], without keys `window` or more places back.

    A window applies everywhere here: such a mask does not say what is prefix. A query to which that leaves no key
    attends to itself, as padding does.

    query_positions: int64 [B, S]; key_positions: int64 [B, T]. The queries are the last S of the keys. Raises
    ValueError on another shape or dtype.
    """
    B, S, T = *query_positions.shape, key_positions.shape[1]
    if mask.dtype != torch.bool or mask.shape != (B, 1, S, T):
        raise ValueError(f"mask is {mask.dtype} {list(mask.shape)}, expected torch.bool {[B, 1, S, T]}: [B, 1, S, T]")
    if window is not None:
        mask = mask & (key_positions[:, None, :] > query_positions[:, :, None] - window)[:, None]
    # Over no key at all, one kernel returns zeros, another NaN, and written out, attention is the mean of all values.
    itself = torch.ones_like(mask).tril(T - S).triu(T - S)
    return mask | (itself & ~mask.any(-1, keepdim=True))


def positions(valid: Tensor) -> Tensor:
    """Place of each token among the real tokens of its row, from 0; padding takes no place. bool -> int64 [B, S]."""
    return (valid.long().cumsum(-1) - 1).clamp(min=0)


def token_types_from_labels(labels: Tensor) -> Tensor:
    """Token types for a row that came with labels but without types: the suffix starts at the first label.

    labels: int64 [B, S], -100 where nothing is learned. Returns int64 [B, S]. A row without any label is all prefix.
    """
    return (labels != -100).long().cummax(-1).values


def _causal(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """True where the key is not after the query, and less than `window` places before it. bool [B, S, T].

    Places are counted in real tokens, not in columns, so that padding between two tokens adds no distance.
    """
    # Subtracting would make a table of int64 distances, eight times as large as the mask.
    query, key = query_positions[:, :, None], key_positions[:, None, :]
    allowed = key <= query  # [B, S, T]
    if window is not None:
        allowed &= key > query - window
    return allowed
