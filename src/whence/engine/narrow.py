"""Make a transformer work only where somebody reads it: its head, and the feed-forward part of its last layer.

Only a few places of a text are asked what they say next. What the last layer makes of the other places goes nowhere
once their keys and values are taken, and their logits are the largest thing that a pass would hold. Inside
:func:`narrowed` both are made at the places that are asked, and at no other. Inside :func:`fused` an activation that
transformers writes out in eight steps is computed in one. The numbers stay the same but for rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

WRITTEN_OUT = ("NewGELUActivation", "FastGELUActivation")
"""transformers' classes for x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""


@dataclass
class Narrow:
    """``hidden``: what the head read, [1, place, width]; empty where the model makes its logits in another way."""

    hidden: list[Tensor] = field(default_factory=list)

    def logits(self, made: Tensor, row: Tensor, position: Tensor) -> Tensor:
        """logits[place, word] out of what the model returned."""
        return made[0] if self.hidden else made[row, position]


@contextmanager
def narrowed(model: Any, row: Tensor, position: Tensor, last: nn.Module | None = None) -> Iterator[Narrow]:
    """Inside, logits are made at the places (row, position) alone, as if these were the tokens of one row; and so is
    what ``last`` makes, the :func:`last_feed_forward` part."""
    narrow = Narrow()

    def pick(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        narrow.hidden.append(given[0][row, position][None])
        return (narrow.hidden[-1], *given[1:])

    head = model.get_output_embeddings()
    with ExitStack() as hooks:
        if head is not None:
            hooks.callback(head.register_forward_pre_hook(pick).remove)
        if last is not None and head is not None:
            hooks.enter_context(_at_places(last, row, position))
        yield narrow


@contextmanager
def _at_places(module: nn.Module, row: Tensor, position: Tensor) -> Iterator[None]:
    """Inside, a module that treats each token by itself treats these alone; all others get zeros."""
    shapes: list[torch.Size] = []

    def pick(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not given or given[0].ndim != 3:
            return None
        shapes.append(given[0].shape)
        return (given[0][row, position][None], *given[1:])

    def spread(module: nn.Module, given: Any, made: Any) -> Any:
        if not shapes:
            return None
        out, *rest = made if isinstance(made, tuple) else (made,)
        full = out.new_zeros(*shapes.pop()[:2], out.shape[-1]).index_put((row, position), out[0])
        return (full, *rest) if isinstance(made, tuple) else full

    with ExitStack() as hooks:
        hooks.callback(module.register_forward_pre_hook(pick).remove)
        hooks.callback(module.register_forward_hook(spread).remove)
        yield


def last_feed_forward(model: Any) -> nn.Module | None:
    """The part of the last layer that treats each token by itself; None where it has no name that we know."""
    count = getattr(getattr(model.config, "get_text_config", lambda: model.config)(), "num_hidden_layers", 0)
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count > 0]
    found = getattr(stacks[0][-1], "mlp", None) if len(stacks) == 1 else None
    return found if isinstance(found, nn.Module) else None


@contextmanager
def fused(model: Any) -> Iterator[None]:
    """Inside, activations that are written out step by step are computed in one. The model is left as it was."""
    with ExitStack() as undo:
        for module in model.modules():
            if type(module).__name__ in WRITTEN_OUT and "forward" not in vars(module):
                module.forward = partial(nn.functional.gelu, approximate="tanh")
                undo.callback(vars(module).pop, "forward")
        yield
