"""Tiny pipelines of every family, built once, and an independent witness of their attention."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from whence.models.loading import load
from whence.models.pictures import Pictures
from whence.models.tiny import BUILDERS, tiny
from whence.run import Settings

FAMILIES = tuple(BUILDERS)
PROMPT = "a red circle, left of a white (fluffy) square and the red fox"


@cache
def model(family: str) -> Pictures:
    """Shared: tests must leave it as it was."""
    return load(tiny(family))


def fresh(family: str) -> Pictures:
    """A model of one's own."""
    return load(tiny(family))


def settings(family: str, prompt: str = PROMPT, **changes: Any) -> Settings:
    """Three steps of a picture that is not square, guided where the family can be."""
    guidance = 1.0 if family == "flux-schnell" else 4.0
    negative = "" if family.startswith("flux") else "blue snow"
    values = {"seed": 7, "steps": 3, "guidance": guidance, "height": 64, "width": 48, "negative_prompt": negative}
    return Settings(prompt, **(values | changes))


class Witness:
    """Writes down query, key and mask of every attention of some modules by replacing torch's function."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor | None]] = []

    @contextmanager
    def of(self, denoiser: Any, names: Callable[[str], bool]) -> Any:
        running: list[str] = []
        original = torch.nn.functional.scaled_dot_product_attention

        def recorder(query: Any, key: Any, value: Any, attn_mask: Any = None, **kwargs: Any) -> Any:
            if running:
                self.calls.append((running[-1], query, key, attn_mask))
            return original(query, key, value, attn_mask=attn_mask, **kwargs)

        handles = []
        for name, module in denoiser.named_modules():
            if names(name):
                handles.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
                handles.append(module.register_forward_hook(lambda *_: running.clear()))
        torch.nn.functional.scaled_dot_product_attention = recorder
        try:
            yield self
        finally:
            torch.nn.functional.scaled_dot_product_attention = original
            for handle in handles:
                handle.remove()


def text_attentions(family: str) -> Callable[[str], bool]:
    """Names of the attentions over text, told from the families' layout and not from the adapter."""
    if family in ("sd", "sdxl", "pixart"):
        return lambda name: name.endswith("attn2")
    return lambda name: name.endswith(".attn")


def layout(family: str, keys: int, places: int) -> tuple[slice, slice]:
    """The picture's queries and the text's keys."""
    if family in ("sd", "sdxl", "pixart"):
        return slice(0, places), slice(0, keys)
    if family == "sd3":
        return slice(0, places), slice(places, keys)
    return slice(keys - places, keys), slice(0, keys - places)


def eager_maps(
    family: str, calls: list[Any], pictures: int, places: int, columns: list[list[list[int]]], text_only: bool
) -> dict[str, torch.Tensor]:
    """Mean over steps of the words' probabilities in float64: {layer: [picture, head, word, place]}."""
    sums: dict[str, list[torch.Tensor]] = {}
    for name, query, key, mask in calls:
        queries, text = layout(family, key.shape[2], places_of(family, query, key, places))
        logits = query.double() @ key.double().transpose(-1, -2) / query.shape[-1] ** 0.5
        if mask is not None:
            logits = logits + mask.double()
        logits = logits[-pictures:, :, queries]  # diffusers puts unconditional rows first
        p = logits[..., text].softmax(-1) if text_only else logits.softmax(-1)[..., text]
        maps = torch.stack([torch.stack([p[i][..., c].mean(-1) for c in columns[i]], 1) for i in range(pictures)])
        sums.setdefault(name, []).append(maps)
    return {name: torch.stack(parts).mean(0) for name, parts in sums.items()}


def places_of(family: str, query: torch.Tensor, key: torch.Tensor, places: int) -> int:
    """Picture queries of one call: all of them in cross-attention."""
    return query.shape[2] if family in ("sd", "sdxl", "pixart") else places
