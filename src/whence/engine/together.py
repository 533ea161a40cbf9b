"""Several models, or checkpoints of one, as one objective: its loss is the sum of theirs. No weight belongs to two of
them, so each weight's gradient is that of its own model's loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import RunError
from ..objective import Losses

if TYPE_CHECKING:
    from ..objective import Objective


class Together:
    """``module`` holds the networks as ``0``, ``1``, ... Raises RunError where there is none, or two share one."""

    def __init__(self, objectives: Sequence[Objective], what: str) -> None:
        if not objectives or len({id(o.module) for o in objectives}) < len(objectives):
            raise RunError(what, "there is none, or two share one network", "one or more, each of its own")
        self.objectives, self.name = tuple(objectives), objectives[-1].name
        self.module: nn.Module = nn.ModuleList([o.module for o in objectives])

    def losses(self, examples: Sequence[Any]) -> Losses:
        return total([o.losses(examples) for o in self.objectives])

    def sampled(self, examples: Sequence[Any], seed: int) -> Losses:
        return total([o.sampled(examples, seed) for o in self.objectives])

    def fingerprint(self) -> str:
        return "-".join(o.fingerprint() for o in self.objectives)


def total(found: Sequence[Losses], values: Sequence[Tensor] | None = None) -> Losses:
    """The sum of losses of the same rows; ``values`` stand in for theirs."""
    each = [f.values for f in found] if values is None else values
    first = found[0]
    return Losses(sum(each[1:], each[0]), first.owner, first.stage, first.nodes)
