"""Sees every scaled-dot-product attention of chosen modules, from outside, without replacing anything.

Hooks on the modules say which layer is running; a torch function mode, on the stack only while one of them runs, sees
the call of the kernel. The kernel's own softmax statistics (the log of the sum of exponentials of each query's row)
are kept where torch hands them out, so that any single probability is ``exp(q.k * scale - lse)`` without a second
attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from ..errors import WrongMapError


@dataclass(frozen=True)
class Layer:
    """One attention over text: ``kind`` "cross" (all keys are text) or "joint" (keys are picture and text).

    ``height`` and ``width`` are the grid of the picture's queries; ``text_first`` is the order of a joint sequence.
    """

    name: str
    module: nn.Module
    kind: str
    heads: int
    height: int
    width: int
    text_first: bool = False

    @property
    def grid(self) -> int:
        """Number of picture queries."""
        return self.height * self.width


@dataclass(frozen=True)
class Plan:
    """What to watch in one batch of pictures.

    ``condition``: the prompt embeddings [image, token, feature] that the denoiser receives; the rows of a pass that
    carry them are the conditional rows. ``columns[image][word]``: places of a word on the text axis. ``calls``: the
    largest number of denoiser passes.
    """

    denoiser: nn.Module
    layers: tuple[Layer, ...]
    condition: Tensor
    columns: tuple[tuple[tuple[int, ...], ...], ...]
    calls: int


@dataclass(frozen=True)
class Attention:
    """One kernel call. ``query``, ``key``, ``value``: [row, head, token, channel]; ``mask`` as torch takes it.

    ``rows`` are the conditional rows, ``picture`` the picture's queries, ``text`` the text's keys.
    """

    layer: Layer
    step: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float
    rows: slice
    picture: slice
    text: slice
    columns: tuple[tuple[tuple[int, ...], ...], ...]

    def mask_rows(self, keys: slice = slice(None)) -> Tensor | None:
        """The mask of the conditional rows' picture queries over ``keys``, [row or 1, head or 1, query or 1, key]."""
        if self.mask is None:
            return None
        mask = self.mask.reshape((1,) * (4 - self.mask.ndim) + tuple(self.mask.shape))
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=self.query.dtype, device=mask.device).masked_fill_(~mask, -math.inf)
        mask = mask[self.rows] if mask.shape[0] > 1 else mask
        mask = mask[:, :, self.picture] if mask.shape[2] > 1 else mask
        return mask[..., keys]

    def attend(self, bias: Tensor | None = None, value: Tensor | None = None) -> Tensor:
        """Attention output [row, head, query, channel] of the conditional rows' picture queries.

        ``bias`` [row or 1, head or 1, query or 1, key] is added to the logits; ``value`` stands in for the values.
        """
        mask = self.mask_rows()
        if bias is not None:
            mask = bias if mask is None else mask + bias
        return scaled_dot_product_attention(
            self.query[self.rows][:, :, self.picture],
            self.key[self.rows],
            self.value[self.rows] if value is None else value,
            attn_mask=mask,
            scale=self.scale,
        )


class Observer(Protocol):
    """What is told about each attention."""

    def wants(self, layer: Layer, step: int) -> bool:
        """Whether this layer is to be seen at this step."""

    def edit(self, attention: Attention) -> Tensor | None:
        """A new output for the conditional rows' picture queries, or None to leave it."""

    def seen(self, attention: Attention, lse: Tensor | None) -> None:
        """Takes the attention; ``lse`` [row, head, query] is the log-sum-exp of the logits, where the kernel has it."""


class Recorder(Protocol):
    """What ``model.generate(settings, tape=...)`` takes: an attention tape, or another record of one generation."""

    def rewind(self) -> None:
        """A new generation begins."""

    def check(self, layers: Sequence[Layer], words: int, images: int, calls: int) -> None:
        """Raises before any work what cannot be recorded."""

    def on(self, plan: Plan) -> AbstractContextManager[Watch]:
        """Watch one batch."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``scaled_dot_product_attention``, bit for bit, with the log-sum-exp of its rows where the same kernel has it."""
    exact = (
        query.device.type == "cpu"
        and query.ndim == 4
        and not (dropout_p or is_causal or enable_gqa)
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))
        and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    )
    # 1 names the fused kernel; the others of the CPU materialise the matrix and have no statistics.
    if exact and torch._fused_sdp_choice(query, key, value, attn_mask, scale=scale) == 1:
        mask = attn_mask
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, -math.inf)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=mask, scale=scale
        )
        return out, lse
    return scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    ), None


class Watch(TorchFunctionMode):
    """The state of one watched batch. Made by :func:`watching`."""

    def __init__(self, plan: Plan, observer: Observer) -> None:
        super().__init__()
        self.plan, self.observer = plan, observer
        self.step = -1
        self.rows: slice | None = None
        self.running: Layer | None = None
        self.entered = False
        self._last: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is scaled_dot_product_attention and self.running is not None:
            return self.attention(attend, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def attention(
        self,
        call: Callable[..., tuple[Tensor, Tensor | None]],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *args: Any,
        scale: float | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Runs ``call`` on tensors [row, head, token, channel] and shows it to the observer."""
        layer, rows, tokens = self.running, self.rows, self.plan.condition.shape[1]
        if layer is None or rows is None:
            return call(query, key, value, attn_mask, *args, scale=scale, **kwargs)[0]
        joint = layer.kind == "joint"
        around = layer.grid if joint else 0
        if query.shape[-2] != layer.grid + (tokens if joint else 0) or key.shape[-2] != tokens + around:
            return call(query, key, value, attn_mask, *args, scale=scale, **kwargs)[0]  # e.g. an image prompt's keys
        self.running = None  # a module attends to its text once in a pass
        first = tokens if joint and layer.text_first else 0
        start = around if joint and not layer.text_first else 0
        attention = Attention(
            layer,
            self.step,
            query,
            key,
            value,
            attn_mask,
            query.shape[-1] ** -0.5 if scale is None else scale,
            rows,
            slice(first, first + layer.grid),
            slice(start, start + tokens),
            self.plan.columns,
        )
        out, lse = call(query, key, value, attn_mask, *args, scale=scale, **kwargs)
        self.observer.seen(attention, lse)
        edited = self.observer.edit(attention)
        if edited is not None:
            out = out.clone()
            out[rows, :, attention.picture] = edited
        return out

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pass of the denoiser begins: count it and find the rows that carry the prompt's embeddings."""
        text = kwargs.get("encoder_hidden_states")
        if text is None:
            raise WrongMapError(
                f"the attention of {type(module).__name__}", "it was called without prompt embeddings", "a whole run"
            )
        if text is not self._last:
            self._last, self.rows = text, self._find(text)
        if self.rows is not None:
            self.step += 1

    def _find(self, text: Tensor) -> slice | None:
        condition = self.plan.condition
        images = condition.shape[0]
        if text.shape[1:] != condition.shape[1:]:
            return None
        starts = [s for s in range(0, len(text) - images + 1, images) if torch.equal(text[s : s + images], condition)]
        # With a negative prompt equal to the prompt all blocks match and are the same computation.
        return slice(starts[-1], starts[-1] + images) if starts else None

    def enter(self, layer: Layer) -> None:
        """A watched module begins."""
        if self.rows is not None and self.observer.wants(layer, self.step):
            self.running = layer
            self.__enter__()  # type: ignore[no-untyped-call]
            self.entered = True

    def leave(self) -> None:
        """A watched module ended, or raised."""
        self.running = None
        if self.entered:
            self.entered = False
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]


@contextmanager
def watching(plan: Plan, observer: Observer) -> Iterator[Watch]:
    """Shows every attention of ``plan.layers`` to ``observer``; all hooks come off at the end, also after an error."""
    watch = Watch(plan, observer)
    with ExitStack() as stack:
        stack.callback(watch.leave)
        handle = plan.denoiser.register_forward_pre_hook(watch.begin, with_kwargs=True)
        stack.callback(handle.remove)
        for layer in plan.layers:
            handles = (
                layer.module.register_forward_pre_hook(lambda *_, layer=layer: watch.enter(layer)),
                layer.module.register_forward_hook(lambda *_: watch.leave(), always_call=True),
            )
            for handle in handles:
                stack.callback(handle.remove)
        yield watch
