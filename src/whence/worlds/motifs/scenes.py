"""The law of the graphs: every edge is drawn by its own node, so that any of them can be drawn anew by itself.

A *base* of plain nodes: node i joins one of the nodes before it, uniformly (a random recursive tree); in sparse graphs
some nodes join a second, different one. A *slot* is two nodes of one colour, v and u, of the same colour: v joins a
plain node, uniformly; u joins v half the time (the slot is on), else a plain node, uniformly (off). The edge that u
draws is the slot's unit. A graph stays connected whatever is drawn anew, and its number of edges never changes.

Every edge thus has *places*, the ends that its node may choose; a graph is a choice of one place for each edge. Arm
and twin are slots of one and the same law, so nothing but colour tells their edges apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Choices = NDArray[np.int64]
EDGES = 16
"""Units of every graph."""
NOT_YET = 4
"""Base nodes before this one join one other only: a second edge needs four different places, two of them to swap to."""


@dataclass(frozen=True)
class Plan:
    """Which node draws which edge. Nodes: ``base`` plain ones, then v and u of each of ``slots`` slots.

    ``second``: base nodes that join two others. Edges: those of base nodes 1.., the second ones, then for each slot
    that of v and that of u.
    """

    base: int
    second: tuple[int, ...]
    slots: int

    @property
    def nodes(self) -> int:
        return self.base + 2 * self.slots

    @cached_property
    def owners(self) -> NDArray[np.int64]:
        """The node that draws each edge, owners[edge]."""
        return np.concatenate([np.arange(1, self.base), self.second, np.arange(self.base, self.nodes)]).astype(int)

    @cached_property
    def rivals(self) -> NDArray[np.int64]:
        """The other edge of the same node, which must go elsewhere, rivals[edge]; -1 for none."""
        rival = np.full(len(self.owners), -1)
        for i, node in enumerate(self.second):
            first, other = node - 1, self.base - 1 + i
            rival[first], rival[other] = other, first
        return rival

    @cached_property
    def deciding(self) -> NDArray[np.int64]:
        """The edge that u draws, deciding[slot]."""
        return self.base + len(self.second) + 2 * np.arange(self.slots)

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Number of places of each edge."""
        size = np.minimum(self.owners, self.base)
        size[self.deciding] += 1
        return size

    def places(self, edge: int) -> NDArray[np.int64]:
        """The nodes that this edge may go to from its own; the last of a slot's edge is v, which is "on"."""
        where = np.arange(min(self.owners[edge], self.base))
        return np.append(where, self.owners[edge] - 1) if edge in self.deciding else where

    def ends(self, choices: Choices) -> NDArray[np.int64]:
        """ends[row, edge, 2]: the node that draws the edge, and the one that it joins."""
        # Places are the base nodes in their order; only a slot's last one is another.
        on = np.isin(np.arange(len(self.owners)), self.deciding) & (choices == self.base)
        far = np.where(on, self.owners - 1, choices)
        return np.stack([np.broadcast_to(self.owners, far.shape), far], -1)

    def states(self, choices: Choices) -> NDArray[np.bool_]:
        """Which slots are on, [row, slot]."""
        return np.asarray(choices[:, self.deciding] == self.base)

    def draw(self, rng: np.random.Generator, keep: NDArray[np.bool_], seen: Choices | None = None) -> Choices:
        """choices[row, edge]: kept edges, keep[row, edge], as in seen[edge], the others drawn from the law given these.

        The generator gives the same numbers per row whatever is kept and however rows are batched.
        """
        r = rng.random(keep.shape)
        choices = np.floor(r * self.sizes).astype(int)
        coloured = r[:, self.deciding]
        choices[:, self.deciding] = np.where(coloured < 0.5, self.base, np.floor((2 * coloured - 1) * self.base))
        if seen is None:
            seen = choices[0]
        else:
            choices = np.where(keep, seen, choices)
        for i, _ in enumerate(self.second):
            second = self.base - 1 + i
            first = int(self.rivals[second])
            for edge, other in ((first, second), (second, first)):
                # The first of two that are both drawn anew is free; the second must go elsewhere.
                bound = ~keep[:, edge] & (keep[:, other] | (edge == second))
                away = np.floor(r[:, edge] * (self.sizes[edge] - 1)).astype(int)
                away += away >= choices[:, other]
                choices[:, edge] = np.where(bound, away, choices[:, edge])
        return choices

    def opposite(self, rng: np.random.Generator, seen: Choices) -> Choices:
        """opposite[edge]: where each edge goes when it is put into its opposite state. A slot's edge: off to on, on to
        a plain node. Others: another place, none that its rival has or would go to; itself where there is no other."""
        other = seen.copy()
        for edge in range(len(seen)):
            taken = {int(seen[edge])}
            rival = int(self.rivals[edge])
            if rival >= 0:
                taken |= {int(seen[rival]), int(other[rival])}
            if edge in self.deciding:
                free = list(range(self.base)) if seen[edge] == self.base else [self.base]
            else:
                free = [p for p in range(self.sizes[edge]) if p not in taken]
            if free:
                other[edge] = free[rng.integers(len(free))]
        return other


def plan(rng: np.random.Generator, slots: int, edges: int = EDGES) -> Plan:
    """A tree or, by a coin, a sparse graph, with this many slots and edges."""
    left = edges - 2 * slots
    second = int(rng.integers(2)) * (left // 4)
    base = left - second + 1
    owners = np.sort(rng.choice(np.arange(NOT_YET, base), second, replace=False))
    return Plan(base, tuple(owners.tolist()), slots)


@dataclass(frozen=True)
class Scene:
    """One graph about which a question is asked, under permuted nodes and edges.

    ``node[i]`` is the name of the plan's node i, ``edge[k]`` the plan's edge that is unit k.
    """

    plan: Plan
    seen: Choices
    other: Choices
    node: NDArray[np.int64]
    edge: NDArray[np.int64]

    @cached_property
    def places(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """places[unit]: the ends, as node names, that this edge may have; the observed ones first."""
        out = []
        for k in self.edge:
            at = int(self.seen[k])
            where = self.plan.places(int(k))
            order = [at, *(p for p in range(len(where)) if p != at)]
            owner = int(self.node[self.plan.owners[k]])
            out.append(tuple((owner, int(self.node[where[p]])) for p in order))
        return tuple(out)

    def ends(self, choices: Choices) -> NDArray[np.int64]:
        """ends[row, unit, 2]: node names."""
        return np.asarray(self.node[self.plan.ends(choices)[:, self.edge]])

    def unit(self, slot: int) -> int:
        """The unit that is this slot's edge."""
        return int(np.flatnonzero(self.edge == self.plan.deciding[slot])[0])

    def redrawn(self, keep: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.int64]:
        """ends[row, unit, 2] with the units of keep[row, unit] as seen and the others drawn anew."""
        kept = np.empty_like(keep)
        kept[:, self.edge] = keep
        return self.ends(self.plan.draw(rng, kept, self.seen))

    def swapped(self, which: NDArray[np.bool_]) -> NDArray[np.int64]:
        """ends[row, unit, 2] with the units of which[row, unit] in their opposite state."""
        flipped = np.empty_like(which)
        flipped[:, self.edge] = which
        return self.ends(np.where(flipped, self.other, self.seen))


def scene(rng: np.random.Generator, states: Sequence[bool]) -> Scene:
    """A graph whose slots are in these states."""
    p = plan(rng, len(states))
    seen = p.draw(rng, np.zeros((1, EDGES), bool))[0]
    for edge, on in zip(p.deciding, states, strict=True):
        seen[edge] = p.base if on else rng.integers(p.base)
    return Scene(p, seen, p.opposite(rng, seen), rng.permutation(p.nodes), rng.permutation(EDGES))
