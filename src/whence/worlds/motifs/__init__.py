"""Motifs: graphs in which one of two twin arms decides, and a net of PyG's layers that learned which.

A unit is an edge. An arm's edge is on if it joins its node to another of the same colour and off if it joins it to a
plain one. ``ask`` draws edges anew from the law of the graphs (:mod:`.scenes`), ``swap`` puts them into their opposite
state; no edge is ever taken out. Inputs for gradients are the weights of all places that an edge may have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...engine.randomness import stream
from ...models.graphs import EdgeQuestion, GraphNet, edge_question, undirected
from ..ground import Draw, Planted
from . import learn
from .scenes import Scene, scene

OBSERVED = MappingProxyType(
    {
        "single": (((True,), True),),
        "and": (((True, True), True),),
        "or": (((True, True), True),),
        "xor": (((True, False), True), ((False, True), True)),
        "suppression": (((True, True), False),),
        "absence": (((False,), True),),
    }
)
"""The states of arm and twin about which each structure is asked, and the outcome."""


class Motif:
    """The Question of one graph to one net, as its world sees it."""

    def __init__(self, asked: EdgeQuestion, drawn: Scene) -> None:
        self._asked, self._scene = asked, drawn
        self.units, self.readout, self.capabilities = asked.units, asked.readout, asked.capabilities
        self.data, self.ask, self.forward, self.background = asked.data, asked.ask, asked.forward, asked.background
        self.restart = asked.restart

    @property
    def inputs(self) -> Tensor:
        """Weights of the places that edges may have, [1, place]: first the observed edges, at 1, the others at 0."""
        return self._asked.inputs

    @property
    def unit_of(self) -> Tensor:
        """The unit of each place, [1, place]."""
        return self._asked.unit_of

    def swap(self, which: NDArray[np.bool_]) -> NDArray[np.float64]:
        """See :meth:`whence.worlds.ground.Oracle.swap`. A slot's edge goes from its own colour to a plain node or the
        other way, another edge to another plain node; where each one goes is drawn with the graph."""
        return self._asked.values(self._scene.swapped(np.asarray(which, bool)))


@dataclass(frozen=True)
class Motifs:
    """The world. ``questions``: graphs asked about per structure, each with its own permuted names."""

    name: str = "motifs"
    structures: tuple[str, ...] = tuple(OBSERVED)
    questions: int = 1

    def scenes(self, key: str) -> list[tuple[str, Scene, bool]]:
        """Structure, graph and outcome of each question; arm and twin are in the same states. No net is trained."""
        out = []
        for structure in self.structures:
            for i in range(self.questions):
                rng = stream(self.name, key, structure, i, "graph")
                cases = OBSERVED[structure]
                states, outcome = cases[int(rng.integers(len(cases)))]
                out.append((structure, scene(rng, states * 2), outcome))
        return out

    def draw(self, key: str) -> Draw:
        """See :meth:`whence.worlds.ground.World.draw`. Nets are kept in memory by key; questions are made anew, with
        their streams at the start. Raises RunError where a key's net does not learn."""
        known, net, nulls = nets(key, self.structures)
        planted = []
        for number, (structure, drawn, outcome) in enumerate(self.scenes(key)):
            name = f"{self.name} {key} {structure}" + (f" {number % self.questions}" if self.questions > 1 else "")

            def ask(who: GraphNet, role: str, columns: NDArray[np.int64] | None = None) -> Motif:
                return _question(who, known, structure, drawn, outcome, (name, role), columns)  # noqa: B023

            arm = tuple(drawn.unit(k) for k in range(drawn.plan.slots // 2))
            twin = tuple(drawn.unit(k) for k in range(drawn.plan.slots // 2, drawn.plan.slots))
            sibling = ask(net, "sibling", known.exchanged(structure))
            blanks = tuple(ask(null, f"null {i}") for i, null in enumerate(nulls))
            planted.append(Planted(name, structure, ask(net, "question"), arm, twin, sibling, blanks))
        return Draw(self.name, key, tuple(planted))


@lru_cache(maxsize=32)
def nets(key: str, structures: tuple[str, ...]) -> tuple[learn.Roles, GraphNet, tuple[GraphNet, ...]]:
    """Who has which colour, the net that learned it, and the nets that learned nothing: one untrained, one trained for
    as long on permuted labels."""
    known = learn.roles(key, structures)
    net, steps = learn.trained(key, known)
    return known, net, (learn.blank(key, known, "untrained"), learn.trained(key, known, steps)[0])


def _question(
    net: GraphNet, known: learn.Roles, structure: str, drawn: Scene, outcome: bool, names: Sequence[object],
    columns: NDArray[np.int64] | None,
) -> Motif:  # fmt: skip
    x = np.zeros((drawn.plan.nodes, known.features), np.float32)
    x[drawn.node] = known.paint(drawn.plan, structure)
    output = list(known.colours).index(structure)
    asked = edge_question(
        net,
        undirected(x, drawn.ends(drawn.seen[None])[0]),
        _observed(output, outcome),
        call=_called(columns),
        resample=drawn.redrawn,
        places=drawn.places,
        readout=f"probability that output {output} is {'on' if outcome else 'off'}, as observed",
        names=("motifs", *names),
    )
    return Motif(asked, drawn)


def _observed(output: int, outcome: bool) -> Callable[[Tensor], Tensor]:
    def probability(logits: Tensor) -> Tensor:
        return (logits[:, output] if outcome else -logits[:, output]).sigmoid()

    return probability


def _called(columns: NDArray[np.int64] | None) -> Callable[[GraphNet, Tensor, Tensor, Tensor, Tensor], Tensor]:
    def call(net: GraphNet, x: Tensor, index: Tensor, weight: Tensor, batch: Tensor) -> Tensor:
        return net(x if columns is None else x[:, columns], index, weight, batch)  # type: ignore[no-any-return]

    return call


WORLD = Motifs()
