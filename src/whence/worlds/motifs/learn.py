"""Nets that learned which colours decide, and those that learned nothing.

One net answers for all structures, one output each. Of every structure's colours the first half, the arm's, decides its
output and the second half, the twin's, nothing; which column of the features is which colour is drawn from the key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray

from ...engine.randomness import stream
from ...errors import RunError
from ...models.graphs import GraphNet
from ..ground import STRUCTURES
from .scenes import EDGES, Plan, plan

Bools = NDArray[np.bool_]
DECIDES: Mapping[str, Callable[[Bools], Bools]] = MappingProxyType(
    {
        "single": lambda on: on[:, 0],
        "and": lambda on: on[:, 0] & on[:, 1],
        "or": lambda on: on[:, 0] | on[:, 1],
        "xor": lambda on: on[:, 0] ^ on[:, 1],
        "suppression": lambda on: on[:, 0] & ~on[:, 1],
        "absence": lambda on: ~on[:, 0],
    }
)
"""What each output should say of the states of the arm's slots, on[graph, slot]."""
HIDDEN, PER_STRUCTURE, STEPS, AT_MOST, RATE = 48, 16, 50, 1_000, 0.01
SMOOTH = 0.02
"""Labels are this far from 0 and 1: a net that is never quite sure keeps gradients that can be read."""
GOOD = 0.1
"""Training stops when no probability for fresh graphs is further than this from its label, two times in a row."""


@dataclass(frozen=True)
class Roles:
    """``colours[structure]``: the columns of the arm's slots, then those of the twin's. Column 0 is plain."""

    colours: Mapping[str, tuple[int, ...]]

    @property
    def features(self) -> int:
        return 1 + sum(map(len, self.colours.values()))

    def paint(self, p: Plan, structure: str) -> NDArray[np.float32]:
        """Features [node, column] of a plan's nodes: each slot's two nodes in its colour."""
        x = np.zeros((p.nodes, self.features), np.float32)
        x[: p.base, 0] = 1
        for slot, colour in enumerate(self.colours[structure]):
            x[p.base + 2 * slot : p.base + 2 * slot + 2, colour] = 1
        return x

    def exchanged(self, structure: str) -> NDArray[np.int64]:
        """Columns with the arm's and the twin's colours in each other's place."""
        columns, own = np.arange(self.features), np.array(self.colours[structure])
        columns[own] = np.roll(own, len(own) // 2)
        return columns


def roles(key: str, structures: tuple[str, ...]) -> Roles:
    """Colours for each structure: the coin that makes one of two arms decide. Outputs are in an order of the key's own,
    or their numbers would say which structure is asked about."""
    rng = stream("motifs", key, "roles")
    sizes = {s: 2 * STRUCTURES[s].size for s in structures}
    columns = iter((1 + rng.permutation(sum(sizes.values()))).tolist())
    listed = [structures[i] for i in rng.permutation(len(structures))]
    return Roles({s: tuple(next(columns) for _ in range(sizes[s])) for s in listed})


@dataclass(frozen=True)
class Lesson:
    """Graphs of all structures in one batch: a net's inputs, and for each graph its structure and its label."""

    x: torch.Tensor
    edge_index: torch.Tensor
    batch: torch.Tensor
    structure: torch.Tensor
    label: torch.Tensor

    def probability(self, net: GraphNet) -> torch.Tensor:
        """Of "on", [graph], by the output of the graph's own structure."""
        logits = net(self.x, self.edge_index, None, self.batch)
        own: torch.Tensor = logits.gather(1, self.structure[:, None])[:, 0]
        return own.sigmoid()


def lesson(rng: np.random.Generator, known: Roles, each: int) -> Lesson:
    """``each`` fresh graphs of every structure; those of one structure share a plan."""
    xs, edges, labels, nodes, graphs = [], [], [], 0, []
    for structure, colours in known.colours.items():
        p = plan(rng, len(colours))
        choices = p.draw(rng, np.zeros((each, EDGES), bool))
        ends = p.ends(choices) + nodes + p.nodes * np.arange(each)[:, None, None]
        xs.append(np.tile(known.paint(p, structure), (each, 1)))
        edges.append(ends.reshape(-1, 2))
        labels.append(DECIDES[structure](p.states(choices)))
        graphs.append(np.full(each, p.nodes))
        nodes += each * p.nodes
    index = np.concatenate(edges).T
    sizes = np.concatenate(graphs)
    return Lesson(
        torch.from_numpy(np.concatenate(xs)),
        torch.from_numpy(np.concatenate([index, index[::-1]], 1)),
        torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)),
        torch.from_numpy(np.repeat(np.arange(len(labels)), each)),
        torch.from_numpy(np.concatenate(labels)).float(),
    )


def blank(key: str, known: Roles, *names: object) -> GraphNet:
    """A net that learned nothing yet."""
    return _frozen(GraphNet(known.features, HIDDEN, len(known.colours), names=("motifs", key, *names)))


def _frozen(net: GraphNet) -> GraphNet:
    return net.eval().requires_grad_(False)


def trained(key: str, known: Roles, steps: int | None = None) -> tuple[GraphNet, int]:
    """A net that learned, and in how many steps. With ``steps`` given, one that took as many over labels permuted
    within each structure. Every step has fresh graphs. Raises RunError where training fails."""
    name = "learned" if steps is None else "permuted"
    rng, check = stream("motifs", key, name), stream("motifs", key, "check")
    net = blank(key, known, name).requires_grad_(True)
    adam = torch.optim.Adam(net.parameters(), RATE)
    good = 0
    for step in range(1, (steps or AT_MOST) + 1):
        given = lesson(rng, known, PER_STRUCTURE)
        label = given.label
        if steps is not None:
            shuffled = [i * PER_STRUCTURE + rng.permutation(PER_STRUCTURE) for i in range(len(known.colours))]
            label = label[torch.from_numpy(np.concatenate(shuffled))]
        loss = torch.nn.functional.binary_cross_entropy(given.probability(net), label * (1 - 2 * SMOOTH) + SMOOTH)
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        if steps is None and step % STEPS == 0:
            good = good + 1 if error(net, lesson(check, known, 64)) < GOOD else 0
            if good == 2:
                break
    if steps is None and good < 2:
        raise RunError(f"the world motifs of key {key!r}", f"not learned in {AT_MOST} steps", "another key")
    return _frozen(net), step


def error(net: GraphNet, given: Lesson) -> float:
    """The largest distance of a probability from its label."""
    with torch.no_grad():
        return float((given.probability(net) - given.label).abs().max())
