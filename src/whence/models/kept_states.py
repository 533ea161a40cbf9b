"""Keeps what a language model has read: keys and values of a beginning, once, for all texts that begin so.

transformers lets attention functions be registered by name, and asks a cache object for the keys of earlier tokens.
Ours keep one row of states, in one place that does not grow. Rows of a pass that share the beginning are not given
copies of it: with keys K of the beginning and k of the row's own tokens, attention over both is

    softmax([q K', q k']) [V; v] = s A(q, K, V) + (1 - s) A(q, k, v),     s = sigmoid(L(q, K) - L(q, k))

with A attention over one part and L = log sum exp of its scores: the queries of all rows go through the beginning
together, and no mask is made of it. In the last layer, queries are made only at the places that are asked.

Scaled attention takes the same way with one more feature u of queries and w of keys, whose product is added to q k':

    bias: u = 1, w = ln f sqrt(d);     multiply: f k for k, u = m, the least score that the query may see, w = 1 - f

as (h - m) f = h f + m (1 - f) but for -m, which is the same for all keys of a query and does not change a softmax.

Models with sliding windows or capped scores, and other devices than CPUs, go the long way: keys side by side, under a
mask. A model whose states cannot be kept so (a recurrence, its own attention code) has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .suppression import can_suppress, check_way, least_scores, scaled_attention

NAME = "whence_kept"
_STATES: ContextVar[KeptStates | None] = ContextVar("kept states", default=None)
_FOREIGN = ("s_aux", "position_bias", "sinks")
"""What some models give their attention beside keys and values, and ours does not know."""


class KeptStates:
    """The states of one beginning, see :class:`~whence.engine.ablate.Keeper`. ``how``: the way in which attention is
    scaled where a scale is given, "multiply" or "bias"."""

    def __init__(self, model: Any, how: str = "bias") -> None:
        check_way(model, how)
        self.model, self.how = model, how
        config = model.config.get_text_config()
        self._layers = int(config.num_hidden_layers)
        self._room: dict[int, tuple[Tensor, Tensor]] = {}
        self._longest = self.shared = self._stored = 0
        self._places: Tensor | None = None
        self._scale: Tensor | None = None

    @classmethod
    def of(cls, model: Any, how: str = "") -> KeptStates | None:
        """The keeper of a model; None where its states cannot be kept. Raises MethodError where attention has to be
        scaled (``how``) and cannot be."""
        return cls(model, how or "bias") if how or can_suppress(model) else None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, the model's attention is ours. It is left as it was, and what was kept is forgotten."""
        from transformers import AttentionInterface, AttentionMaskInterface

        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, _mask)
        before = self.model.config._attn_implementation
        token = _STATES.set(self)
        self.model.set_attn_implementation(NAME)
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)
            _STATES.reset(token)
            self._room, self._longest = {}, 0

    def make_room(self, longest: int) -> None:
        """For beginnings of so many tokens at most; what was kept is forgotten."""
        self._room, self._longest = {}, longest

    def given(self, shared: int, stored: int, places: Tensor | None, scale: Tensor | None) -> dict[str, Any]:
        """What the model gets beside the tokens of the next pass, which follow the ``shared`` first kept ones. Of the
        pass's last row so many tokens are ``stored``. ``places[row, target]``: the only positions that are asked; None:
        any may be. ``scale[row, key]`` of attention."""
        self.shared, self._stored, self._places, self._scale = shared, stored, places, scale
        from transformers.cache_utils import Cache

        return {"past_key_values": Cache(layers=[_layer()(self, i) for i in range(self._layers)]), "use_cache": True}

    # -- what the model calls -----------------------------------------------------------------------------------------

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Take the states of a pass's new tokens in one layer."""
        if not self._stored:
            return
        if layer not in self._room:
            (_, a, _, b), (_, c, _, d) = key.shape, value.shape
            self._room[layer] = key.new_empty(1, a, self._longest, b), value.new_empty(1, c, self._longest, d)
        for room, new in zip(self._room[layer], (key, value), strict=True):
            room[:, :, self.shared : self.shared + self._stored] = new[-1:, :, : self._stored]

    def past(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the beginning, [1, head, token, width]."""
        if not self.shared:
            return None
        key, value = self._room[layer]
        return key[:, :, : self.shared], value[:, :, : self.shared]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float,
        softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """[row, token, head, width], see the module's words."""
        past, scale = self.past(layer), self._scale
        simple = mask is None and softcap is None and query.shape[-1] == value.shape[-1]
        if simple and query.device.type == "cpu":
            places = self._places if layer == self._layers - 1 else None
            if scale is None:
                return _apart(query, key, value, past, scaling, places)
            scaled = _scaled(query, key, value, past, scale.to(query.dtype), scaling, self.how)
            return _apart(*scaled, scaling, places)[..., :-1]
        if past is not None:
            rows = len(query)
            key = torch.cat([past[0].expand(rows, -1, -1, -1), key], 2)
            value = torch.cat([past[1].expand(rows, -1, -1, -1), value], 2)
        if softcap is None and self._scale is None:
            key, value = _each_head(key, query), _each_head(value, query)
            if mask is None:
                mask = _causal(query.shape[2], key.shape[2], query.device)
            out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
            return out.transpose(1, 2)
        return scaled_attention(query, key, value, mask, scaling, softcap, self._scale, self.how)


@cache
def _layer() -> type:
    """What transformers asks for the earlier tokens of a layer: it gets their number, and leaves the states of the new
    ones here."""
    from transformers.cache_utils import DynamicLayer

    class Layer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
        def __init__(self, states: KeptStates, number: int) -> None:
            super().__init__()
            self.states, self.number, self.is_initialized = states, number, True

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            self.states.store(self.number, key_states, value_states)
            return key_states, value_states

        def get_seq_length(self) -> int:
            return self.states.shared

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.states.shared + query_length, 0

    return Layer


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' interface: [row, head, token, width] in, [row, token, head, width] out."""
    states = _STATES.get()
    assert states is not None
    foreign = [name for name in _FOREIGN if kwargs.get(name) is not None]
    if foreign:  # `Ablation._agrees` hears it, and asks such a model without kept states
        raise NotImplementedError(f"attention with {foreign[0]}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer, softcap = int(module.layer_idx), kwargs.get("softcap")
    return states.attend(layer, query, key, value, attention_mask, scaling, softcap).contiguous(), None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """None for a plain causal mask, which our attention knows by itself; else True where a query may look."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    if kwargs.get("mask_function") is causal_mask_function and kwargs.get("attention_mask") is None:
        return None
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})  # type: ignore[no-any-return]


def _causal(queries: int, keys: int, device: torch.device) -> Tensor:
    """[query, key]: True where it may look; the queries are the last ones."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _each_head(x: Tensor, query: Tensor) -> Tensor:
    """Keys or values that several heads share, once for each."""
    groups = query.shape[1] // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, 1)


def _scaled(
    query: Tensor, key: Tensor, value: Tensor, past: tuple[Tensor, Tensor] | None, scale: Tensor, scaling: float,
    how: str,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:  # fmt: skip
    """The same with one more feature, so that attention is scaled by scale[row, key]; 0 in values."""
    before = 0 if past is None else past[0].shape[2]

    def more(x: Tensor, feature: Tensor | float) -> Tensor:
        return torch.cat([x, x.new_zeros(*x.shape[:-1], 1) + feature], -1)

    def scaled(x: Tensor, f: Tensor) -> Tensor:
        return more(x, f.log() / scaling) if how == "bias" else more(x * f, 1 - f)

    asked = more(
        query, 1.0 if how == "bias" else least_scores(query, key, None if past is None else past[0])[..., None]
    )
    if past is not None:  # the rows of a pass share their beginning, and how it is scaled
        past = scaled(past[0], scale[:1, None, :before, None]), more(past[1], 0.0)
    own = scale[:, None, before : before + key.shape[2], None]
    return asked, scaled(key, own), more(value, 0.0), past


def _apart(
    query: Tensor, key: Tensor, value: Tensor, past: tuple[Tensor, Tensor] | None, scaling: float, places: Tensor | None
) -> Tensor:
    """Attention to the beginning and to the row's own tokens, each with the log of its summed scores."""
    part = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    rows, heads, tokens, width = query.shape
    shared = key.shape[1]
    own = _each_head(key, query), _each_head(value, query)
    if places is None:
        out, level = part(query, *own, 0.0, True, scale=scaling)
    else:
        query = query.gather(2, places[:, None, :, None].expand(-1, heads, -1, width))
        ahead = torch.arange(tokens, device=query.device) > places[:, None, :, None]
        hidden = query.new_zeros(ahead.shape).masked_fill_(ahead, -torch.inf)
        out, level = part(query, *own, 0.0, False, attn_mask=hidden, scale=scaling)
    if past is not None:
        asked = query.shape[2]
        # The queries of all rows, and of all heads that share keys, are the queries of one long row.
        folded = query.reshape(rows, shared, -1, width).transpose(0, 1).reshape(1, shared, -1, width)
        before, above = part(folded, *past, 0.0, False, scale=scaling)
        before = before.reshape(shared, rows, -1, width).transpose(0, 1).reshape(rows, heads, asked, width)
        above = above.reshape(shared, rows, -1).transpose(0, 1).reshape(rows, heads, asked)
        out = out.lerp(before, (above - level).sigmoid()[..., None].to(out.dtype))
    turned: Tensor = out.transpose(1, 2)
    if places is None:
        return turned
    full: Tensor = out.new_zeros(rows, tokens, heads, width)
    full[torch.arange(rows, device=out.device)[:, None], places] = turned
    return full
