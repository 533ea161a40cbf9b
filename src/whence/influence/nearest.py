"""Which training examples are most like this output? Neighbours of what the model has inside; no gradient.

    h(z)        = mean over positions of a layer's activations while the model reads z
    score(q, i) = cos(h(q), h(z_i))

Likeness is no cause. It is what the other methods of this room have to beat: on examples that are equally alike, of
which some taught the model the outcome and others did not, it is at chance. Where it agrees with them, it is the
cheaper answer. ``embed``: any other function of an example (a CLIP model, its pixels) in place of the layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..engine.codes import Numbers
from ..engine.influence import Fitted
from ..engine.schemes import Rows
from ..errors import MethodError, RunError
from ..method import Card

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..engine.influence import Shelf
    from ..explanation import Explanation
    from ..objective import Examples, Objective

CARD = Card(
    name="nearest",
    verb="Nearest",
    paper="no paper's own: the nearest neighbours that Hanawa et al. 2021, Evaluation of Similarity-based "
    "Explanations, weigh among others",
    systems=(),
    question="Which training examples are most like this output?",
    units=("training example",),
    works_on=("language models", "diffusion models", "classifiers", "graph nets", "anything with an embedding"),
    needs=("training examples",),
    cost="one forward per training example, once; one per query, then a scan",
    claim="Of the training examples those that are most like the output are named first, whatever they did.",
    falsifier={
        "status": "not shown",
        "reason": "likeness is all that it knows: a carrier and its twin, which are equally alike, it cannot tell "
        "apart, and this trial is about nothing else",
        "trial": "carriers.marks",
        "planted": "the carriers, whose mark goes with one label throughout",
        "expect": 0.9,
        "control": "random and shuffled scores: about .5, as its own should be",
        "seconds": 5,
    },
    departs="The layer is by default what goes into the last one that has weights. Rows are float16.",
    avoid="As an answer to why: it is a baseline. A gradient method that does not beat it has found likeness too.",
)


@dataclass(frozen=True)
class Nearest:
    """``layer``: name of the module whose output is taken; None: what goes into the last module with weights that is
    called. ``embed``: a function of one example that gives its numbers, instead."""

    layer: str | None = None
    embed: Callable[[Any], Any] | None = None

    def fit(self, objective: Objective, examples: Examples, shelf: Shelf | None = None) -> Fitted:
        """One pass over the examples. Raises RunError, MethodError."""
        from ..engine.influence import Memory, build

        began = time.monotonic()
        if not len(examples):
            raise RunError("training examples", "there is none", "one or more")
        shelf = Memory() if shelf is None else shelf
        reader: Any = _Reader(objective, self.layer, self.embed)
        width = reader.gradients([examples[0]])["embedding"].shape[1]
        scheme = _Scheme(Numbers({"embedding": (width,)}, "float16"))
        skipped = build(scheme, reader, examples, shelf, what="embeddings").numbers
        notes = []
        if skipped:
            named = ", ".join(examples.label(i) for i in skipped[:5])
            notes.append(f"{len(skipped)} examples have embeddings that are not finite and score 0: {named}")
        settings = {"layer": self.layer, "embed": getattr(self.embed, "__name__", None)}
        seconds = time.monotonic() - began
        return _Alike(CARD.name, settings, scheme, reader, examples, shelf, seconds, tuple(skipped), tuple(notes))


@dataclass(frozen=True)
class _Alike(Fitted):
    def explain(self, query: Any) -> Explanation:
        """Likeness of all examples to one query."""
        readout = "how like the output the example is to the model (cosine); not what it did"
        return replace(super().explain(query), readout=readout, kind="similarity")


class _Reader:
    """Reads examples as a gradient bank takes gradients: "embedding" -> [example, feature, 1]."""

    def __init__(self, objective: Objective, layer: str | None, embed: Callable[[Any], Any] | None) -> None:
        modules = dict(objective.module.named_modules())
        if layer is not None and layer not in modules:
            known = ", ".join(n for n in modules if n)
            raise MethodError(f"activations of {layer!r} of {objective.name}", "no module has this name", known)
        self.objective, self.embed = objective, embed
        self.module = None if layer is None else modules[layer]

    def gradients(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        import numpy as np
        import torch

        if self.embed is not None:
            rows = [torch.as_tensor(np.asarray(self.embed(e), dtype=np.float32)).flatten() for e in examples]
            return {"embedding": torch.stack(rows)[..., None]}
        rows = [torch.empty(0)] * len(examples)
        for group in self._alike(examples):
            for i, row in zip(group, self._read([examples[i] for i in group]), strict=True):
                rows[i] = row
        return {"embedding": torch.stack(rows)[..., None]}

    def _alike(self, examples: Sequence[Any]) -> list[list[int]]:
        """Numbers of examples that can be read together: texts of one length, as a mean would take padding in."""
        tokens = getattr(self.objective, "tokens", None)
        groups: dict[int, list[int]] = {}
        for i, example in enumerate(examples):
            groups.setdefault(len(tokens(example)[0]) if tokens else 0, []).append(i)
        return list(groups.values())

    def _read(self, examples: list[Any]) -> Tensor:
        """[example, feature]."""
        import torch

        seen: list[tuple[nn.Module, Any]] = []

        def goes_in(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
                seen[:] = [(module, args[0])]

        def comes_out(module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
            seen[:] = [(module, y[0] if isinstance(y, tuple) else y)]

        with ExitStack() as hooks, torch.no_grad():
            if self.module is not None:
                hooks.callback(self.module.register_forward_hook(comes_out).remove)
            else:
                for module in self.objective.module.modules():
                    if next(module.parameters(recurse=False), None) is not None:
                        hooks.callback(module.register_forward_pre_hook(goes_in).remove)
            found = self.objective.losses(examples)
        if not seen:
            raise MethodError(f"activations of {self.objective.name}", "the layer was never called", "another layer=")
        x, owner = _mean(*seen[0]), found.owner
        if found.nodes is not None and len(x) == len(found.nodes) != len(found.values):
            owner = found.nodes
        elif len(x) != len(found.values):
            asked = f"activations of {self.objective.name} by example"
            raise MethodError(asked, f"{len(x)} of them for {len(found.values)} rows of loss", "another layer=")
        if owner is None:
            return x
        owner = owner.cpu()
        count = torch.bincount(owner, minlength=len(examples))[:, None]
        return torch.zeros(len(examples), x.shape[1]).index_add_(0, owner, x) / count


def _mean(module: nn.Module, x: Tensor) -> Tensor:
    """[row, feature]: the mean over positions, on the CPU. Convolutions and what goes with them have their channels
    first."""
    from torch import nn

    x = x.detach().float()
    if x.ndim > 2:
        last = x.ndim == 3 or isinstance(module, nn.Linear | nn.LayerNorm)
        first = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.GroupNorm | nn.BatchNorm1d) or not last
        x = x.flatten(2).mean(2) if first else x.flatten(1, -2).mean(1)
    return x.cpu()


class _Scheme(Rows):
    plane = "embedding"

    def features(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """h, of length 1."""
        from torch.nn.functional import normalize

        return {"embedding": normalize(gradients["embedding"][..., 0].double(), dim=1).float()}
