"""Objective and Examples: a model with the loss of an example, and the examples that it was trained on.

What asks "which training examples made it say this?" needs the gradient of each example's loss. Adapters and worlds
make Objectives; the gradient bank (engine/gradients.py) takes the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Losses:
    """Losses of a batch of examples, one or several rows for each.

    ``values``[row], differentiable: each row's loss depends on its own example alone. ``owner``[row]: the example of
    the batch that a row belongs to (None: row i is example i). ``stage``[row]: the row's place in a diffusion model's
    grid of timesteps. ``nodes``[node]: the row that each node of a batch of graphs belongs to.
    """

    values: Tensor
    owner: Tensor | None = None
    stage: Tensor | None = None
    nodes: Tensor | None = None


class Objective(Protocol):
    """A model and the loss of its examples."""

    name: str

    @property
    def module(self) -> nn.Module:
        """The trained network; nothing else changes when it learns. In evaluation mode, in float32."""
        ...

    def losses(self, examples: Sequence[Any]) -> Losses:
        """The loss of each example, in nats where it is a log-likelihood."""
        ...

    def sampled(self, examples: Sequence[Any], seed: int) -> Losses:
        """The same with the model's own draws in place of the examples' targets: what the Fisher information is
        taken over."""
        ...

    def fingerprint(self) -> str:
        """Hash of the weights."""
        ...


class Examples(Protocol):
    """A training set: examples by number, in the form that the objective takes."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Any: ...

    def label(self, number: int) -> str:
        """What a person calls the example."""
        ...

    def fingerprint(self) -> str:
        """Hash of the examples, in their order."""
        ...


@dataclass(frozen=True)
class Listed:
    """Examples that are held in memory.

    >>> Listed(("a", "b")).label(1)
    'b'
    """

    items: tuple[Any, ...]
    labels: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int, /) -> Any:
        return self.items[number]

    def label(self, number: int) -> str:
        return self.labels[number] if self.labels else str(self.items[number])

    def fingerprint(self) -> str:
        """Hash of the items: of arrays and tensors by their bytes, of everything else by its text."""
        import hashlib

        import numpy as np

        found = hashlib.sha256()

        def feed(item: Any) -> None:
            if isinstance(item, tuple | list):
                found.update(f"({len(item)}".encode())
                for part in item:
                    feed(part)
            elif hasattr(item, "shape"):
                array = np.ascontiguousarray(np.asarray(item))
                found.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
            else:
                found.update(f"{type(item).__name__}:{item}\x1f".encode())

        feed(self.items)
        return found.hexdigest()[:16]
