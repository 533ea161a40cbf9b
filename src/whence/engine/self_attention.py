"""How strongly each place of a picture attends to every other place, and to the tokens, in one denoiser pass.

Read beside the model's own attention, from the same queries and keys, so that the pass keeps every bit. Costs places x
places for each layer that is read: meant for the small grids of latents, a pass at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import WrongMapError


class Places:
    """Sums of the maps that passes gave: ``self_maps`` [place, place] and ``text_maps`` [place, token], means over
    pictures, heads and layers of the finest grid."""

    def __init__(self, grid: int) -> None:
        self.grid = grid
        self._self: list[Tensor] = []
        self._text: list[Tensor] = []

    def _mean(self, kept: list[Tensor]) -> Tensor:
        if not kept:
            raise WrongMapError(
                f"attention among {self.grid} places", "no layer has this grid", "a UNet with attention at its latents"
            )
        return torch.stack(kept).mean(0)

    @property
    def self_maps(self) -> Tensor:
        """p[place, other], rows sum to 1. Raises WrongMapError where no layer was seen."""
        return self._mean(self._self)

    @property
    def text_maps(self) -> Tensor:
        """p[place, token], rows sum to 1. Raises WrongMapError where no layer was seen."""
        return self._mean(self._text)

    def _hook(self, kept: list[Tensor]) -> Callable[..., None]:
        def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            if states.ndim != 3 or states.shape[1] != self.grid:
                return
            text = kwargs.get("encoder_hidden_states")
            keys = module.to_k(states if text is None else text)
            q, k = (x.unflatten(-1, (module.heads, -1)).transpose(1, 2) for x in (module.to_q(states), keys))
            kept.append((q @ k.transpose(-1, -2) * module.scale).float().softmax(-1).mean((0, 1)))

        return look

    @contextmanager
    def on(self, denoiser: nn.Module) -> Iterator[Places]:
        """Watch the passes inside. Hooks come off also after an error."""
        handles = []
        try:
            for name, module in denoiser.named_modules():
                kept = {"attn1": self._self, "attn2": self._text}.get(name.rpartition(".")[2])
                if kept is not None:
                    handles.append(module.register_forward_pre_hook(self._hook(kept), with_kwargs=True))
            with torch.no_grad():
                yield self
        finally:
            for handle in handles:
                handle.remove()
