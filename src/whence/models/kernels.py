"""What diffusers does around its kernels: backends that bypass torch's, caches that skip blocks, a warning."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..engine.capture import Watch
from ..errors import WrongMapError

_THROUGH_TORCH = "native"
_SKIPPING = ("cache", "pyramid", "layer_skip")


def refuse_caches(denoiser: torch.nn.Module) -> None:
    """Raises WrongMapError if step caches are on: cached blocks attend at some steps only, so maps would be wrong."""
    found = type(getattr(denoiser, "_cache_config", None)).__name__ if _enabled(denoiser) else ""
    for module in denoiser.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for hook in getattr(registry, "hooks", {}).values():
            if any(part in type(hook).__module__.rsplit(".", 1)[-1] for part in _SKIPPING):
                found = found or type(hook).__name__
    if found:
        raise WrongMapError(
            "maps of the attention to words", f"step caches are on ({found}): blocks skip steps", "disable_cache()"
        )


def _enabled(denoiser: Any) -> bool:
    return bool(getattr(denoiser, "is_cache_enabled", False))


@contextmanager
def through_dispatcher(watch: Watch) -> Iterator[None]:
    """Shows the watch those kernels of diffusers' dispatcher that do not pass through torch's own attention.

    Wraps entries of a private table (diffusers 0.42); where the table is missing nothing is wrapped, and the tape
    then finds that its layers were not seen.
    """
    try:
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry
    except ImportError:
        yield
        return
    before = dict(registry._backends)

    def wrapped(original: Any) -> Any:
        def kernel(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
            if watch.running is None:
                return original(query=query, key=key, value=value, attn_mask=attn_mask, **kwargs)  # type: ignore[no-any-return]

            def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **more: Any) -> tuple[Tensor, None]:
                # The dispatcher's order is [row, token, head, channel], torch's [row, head, token, channel].
                out = original(
                    query=q.transpose(1, 2), key=k.transpose(1, 2), value=v.transpose(1, 2), attn_mask=mask, **more
                )
                return out.transpose(1, 2), None

            swapped = (t.transpose(1, 2) for t in (query, key, value))
            return watch.attention(call, *swapped, attn_mask, **kwargs).transpose(1, 2)

        return kernel

    try:
        for name, original in before.items():
            if not str(getattr(name, "value", name)).startswith(_THROUGH_TORCH):
                registry._backends[name] = wrapped(original)
        yield
    finally:
        registry._backends.update(before)


@contextmanager
def without_array_warning() -> Iterator[None]:
    """Several schedulers of diffusers 0.42 make arrays of tensors in a way that numpy 2 complains of and will drop."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy", DeprecationWarning)
        yield
