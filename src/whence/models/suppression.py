"""Scales the attention that tokens of a transformers model get, in all layers and heads, without changing its classes.

With raw scores h = q k^T (before 1/sqrt(d)) and a factor f of each key:

* multiply (AtMan, Deiseroth et al. 2023, section 3.1): h is shifted so that the smallest score that a query may see is
  0, which a softmax does not notice, and multiplied by f. Without the shift a score below 0 would grow.
* bias: ln f is added after the scaling by 1/sqrt(d): each key's odds are multiplied by f.

Scores are made for one head and some queries at a time, and worked on in place: those of all heads at once would be the
most that a pass holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import MethodError

WAYS = ("multiply", "bias")
SCORES = 2**18
"""Scores that may be held at once."""


def can_suppress(model: Any) -> bool:
    """Whether the model's attention goes through the library's table of functions, so that ours can stand in."""
    return bool(getattr(model, "_supports_attention_backend", False)) and not getattr(
        model.config, "is_encoder_decoder", False
    )


def check_way(model: Any, how: str) -> None:
    """Raise MethodError unless this model's attention can be scaled in this way."""
    if how not in WAYS:
        raise MethodError(f"attention scaled by {how!r}", "no such way", "'multiply' or 'bias'")
    if not can_suppress(model):
        found = f"{type(model).__name__} does not take its attention from transformers' table of functions"
        raise MethodError("scaled attention", found, "a method that removes words, such as mexgen")


def scaled_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float | None,
    scale: Tensor | None, how: str,
) -> Tensor:  # fmt: skip
    """[row, token, head, width] of attention, [row, head, token, width] in, with scores scaled by scale[row, key]
    and capped as the model caps them. ``mask``: True where a query may look; None: at itself and all before."""
    rows, heads, tokens, _ = query.shape
    groups, keys = heads // key.shape[1], key.shape[2]
    f = None if scale is None else scale[:, None, :keys].to(query.dtype)
    out = query.new_empty(rows, tokens, heads, value.shape[-1])
    step = max(1, SCORES // (rows * keys))
    place = torch.arange(keys, device=query.device)
    for start in range(0, tokens, step):
        some = slice(start, min(start + step, tokens))
        if mask is None:
            hidden = place > torch.arange(some.start, some.stop, device=query.device)[:, None] + keys - tokens
        else:
            hidden = ~mask[:, 0, some, :keys]
        for head in range(heads):
            h = query[:, head, some] @ key[:, head // groups].transpose(-1, -2)
            if softcap is not None:
                h = h.mul_(scaling / softcap).tanh() * (softcap / scaling)  # a gradient needs what tanh gave
            if f is not None and how == "multiply":
                h.sub_(h.masked_fill(hidden, torch.inf).amin(-1, keepdim=True)).mul_(f)
            h.mul_(scaling)
            if f is not None and how == "bias":
                h.add_(f.log())
            weights = h.masked_fill_(hidden, torch.finfo(h.dtype).min).softmax(-1, dtype=torch.float32)
            out[:, some, head] = weights.to(query.dtype) @ value[:, head // groups]
    return out


def least_scores(query: Tensor, key: Tensor, past: Tensor | None) -> Tensor:
    """[row, head, token]: the smallest raw score of each query with what it may see, ``past`` keys of a beginning that
    all rows share, [1, head, token, width], and its row's own keys up to itself."""
    rows, heads, tokens, width = query.shape
    groups = heads // key.shape[1]
    found = query.new_empty(rows, heads, tokens)
    step = max(1, SCORES // (rows * max(tokens, 0 if past is None else past.shape[2])))
    for start in range(0, tokens, step):
        some = slice(start, min(start + step, tokens))
        ahead = torch.ones(some.stop - start, some.stop - start, dtype=torch.bool, device=query.device).triu(1)
        for head in range(heads):
            q = query[:, head, some]
            h = q @ key[:, head // groups, : some.stop].transpose(-1, -2)
            h[..., start:].masked_fill_(ahead, torch.inf)
            found[:, head, some] = h.amin(-1)
            if past is not None:
                before = (q.reshape(-1, width) @ past[0, head // groups].T).amin(-1)
                found[:, head, some] = torch.minimum(found[:, head, some], before.reshape(rows, -1))
    return found
