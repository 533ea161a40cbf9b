"""Graphs: a small net of PyG's layers, and any PyG graph classifier as something that answers a Question over edges.

A unit is an undirected edge, its two directed messages switched together (an edge that stands in ``edge_index`` in one
direction only is a unit too). What it means to ask again *without* an edge is not the model's to say: the caller hands
a law to draw edges anew from (``resample``), or asks for "drop" by name. Nothing is ever set to zero unasked.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..engine.randomness import seed_of, stream
from ..errors import MethodError
from ..units import Units

with warnings.catch_warnings():
    # PyG scripts some of its own classes when it is imported, which torch has deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch_geometric.data import Data
    from torch_geometric.nn import GraphConv, global_add_pool

if TYPE_CHECKING:
    from numpy.typing import NDArray

Call = Callable[[Any, Tensor, Tensor, Tensor, Tensor], Tensor]
"""How a model is called: (model, x, edge_index, edge_weight, batch) -> logits [graph, output]."""
Resample = Callable[["NDArray[np.bool_]", np.random.Generator], "NDArray[np.int64]"]
"""The law of the edges: keep[row, unit] and a generator -> ends[row, unit, 2]; kept units stay as they are."""
DROP = "drop"
"""A removal that must be asked for by name: the edge is taken out, which leaves the distribution of the graphs."""
_ROWS = 512
"""Graphs sent through the model at once."""


class GraphNet(torch.nn.Module):
    """Layers x_i <- relu(W1 x_i + W2 sum_j w_ij x_j) (GraphConv with edge weights), a sum over nodes, two
    linear layers.

    ``names`` seed the first weights. With sums throughout, an edge of weight 0 and no edge are the same.
    """

    def __init__(self, features: int, hidden: int, outputs: int, layers: int = 2, names: Sequence[object] = ()) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of("graph net", *names))
            widths = [features] + [hidden] * layers
            self.convs = torch.nn.ModuleList(GraphConv(a, b) for a, b in pairwise(widths))
            self.head = torch.nn.Sequential(
                torch.nn.Linear(hidden, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, outputs)
            )

    def forward(
        self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None, batch: Tensor | None = None
    ) -> Tensor:
        """logits [graph, output] of x [node, feature], edge_index [2, message] and edge_weight [message]."""
        for conv in self.convs:
            x = conv(x, edge_index, edge_weight).relu()
        logits: Tensor = self.head(global_add_pool(x, batch))
        return logits


def undirected(x: NDArray[np.float32], ends: NDArray[np.int64]) -> Data:
    """A graph with features x [node, feature] and undirected edges ends[edge, 2]; no edge weights."""
    index = np.concatenate([ends, ends[:, ::-1]]).T
    return Data(x=torch.from_numpy(x), edge_index=torch.from_numpy(np.ascontiguousarray(index)))


def _as_pyg(model: Any, x: Tensor, edge_index: Tensor, edge_weight: Tensor, batch: Tensor) -> Tensor:
    return model(x, edge_index, edge_weight, batch)  # type: ignore[no-any-return]


def _edges(data: Data) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.float32]]:
    """ends[unit, 2], both[unit] (is it in ``edge_index`` in both directions?) and weight[unit]."""
    pairs = [(int(a), int(b)) for a, b in data.edge_index.T.tolist()]
    given = getattr(data, "edge_weight", None)
    weights = [1.0] * len(pairs) if given is None else [float(w) for w in given.reshape(-1)]
    seen: dict[tuple[int, int], float] = {}
    for pair, weight in zip(pairs, weights, strict=True):
        if pair in seen:
            raise MethodError("edges as units", f"two edges from {pair[0]} to {pair[1]}", "a graph without such pairs")
        seen[pair] = weight
    ends, both, weight_of = [], [], []
    for (a, b), weight in seen.items():
        back = seen.get((b, a))
        if a != b and back is not None:
            if back != weight:
                raise MethodError(
                    "edges as units", f"{a}-{b} has weights {weight:g} and {back:g}", "one weight for both directions"
                )
            if (b, a) in ends:
                continue
        ends.append((a, b))
        both.append(a != b and back is not None)
        weight_of.append(weight)
    return np.array(ends, int).reshape(-1, 2), np.array(both, bool), np.array(weight_of, np.float32)


class EdgeQuestion:
    """One output of a graph classifier and the edges of one graph: see :func:`edge_question`.

    ``inputs`` are the weights of all *places* an edge may have, [1, place]: first the observed edges in the order of
    ``units``, at weight 1, then, where they are known, the other places of each unit, at weight 0. ``forward`` is
    differentiable in all of them.
    """

    def __init__(
        self, model: Any, data: Data, value: Callable[[Tensor], Tensor], readout: str, call: Call,
        resample: Resample | str | None, places: Sequence[Sequence[tuple[int, int]]] | None, names: tuple[object, ...],
    ) -> None:  # fmt: skip
        self.data, self._model, self._value, self._call = data, model, value, call
        self._resample, self._names, self.readout = resample, names, readout
        self._rng = stream("edges drawn anew", *names)
        self.ends, self._both, self._weight = _edges(data)
        named = zip(self.ends.tolist(), self._both, strict=True)
        self.units = Units(
            "edge",
            tuple(f"{min(e)}-{max(e)}" if both else f"{e[0]}>{e[1]}" for e, both in named),
            tuple(((a, b),) for a, b in self.ends.tolist()),
        )
        self._known = places is not None
        listed = [tuple(map(int, e)) for e in self.ends]
        owner = list(range(len(listed)))
        for unit, own in enumerate(places or ()):
            others = [p for p in own if {*p} != {*self.ends[unit].tolist()}]
            listed += others
            owner += [unit] * len(others)
        self._places, self._owner = np.array(listed, int).reshape(-1, 2), np.array(owner, int)

    @property
    def capabilities(self) -> frozenset[str]:
        return frozenset({"gradients"})

    def restart(self, purpose: str) -> None:
        """Begin the stream of draws anew, another one for each purpose."""
        self._rng = stream("edges drawn anew", *self._names, purpose)

    def ask(self, keep: NDArray[np.bool_]) -> NDArray[np.float64]:
        """See :meth:`whence.question.Question.ask`. Raises MethodError where an edge is not kept and no law of the
        edges was handed."""
        keep = np.asarray(keep, bool)
        if self._resample == DROP:
            return self.values(np.broadcast_to(self.ends, (*keep.shape, 2)), keep)
        if self._resample is None and not keep.all():
            raise MethodError(
                "the graph without some of its edges",
                "no law to draw edges anew from",
                "edge_question(..., resample=law), or resample='drop' if leaving the distribution is meant",
            )
        return self.values(self._drawn(keep))

    def _drawn(self, keep: NDArray[np.bool_]) -> NDArray[np.int64]:
        if keep.all() or not callable(self._resample):
            return np.broadcast_to(self.ends, (*keep.shape, 2))
        drawn = np.asarray(self._resample(keep, self._rng))
        return np.where(keep[..., None], self.ends, drawn)

    def values(self, ends: NDArray[np.int64], present: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
        """value[row] of the graphs with these ends[row, unit, 2], without the edges that are not present[row, unit]."""
        out = []
        for i in range(0, len(ends), _ROWS):
            e = ends[i : i + _ROWS]
            there = np.ones(e.shape[:2], bool) if present is None else present[i : i + _ROWS]
            row, unit = np.nonzero(there)
            offset = row[:, None] * self._nodes
            forwards, twice = e[row, unit] + offset, self._both[unit] & (e[row, unit, 0] != e[row, unit, 1])
            index = np.concatenate([forwards, forwards[twice][:, ::-1]]).T
            weight = np.concatenate([self._weight[unit], self._weight[unit[twice]]])
            with torch.no_grad():
                value = self._through(
                    len(e), torch.from_numpy(np.ascontiguousarray(index)), torch.from_numpy(weight).to(self.data.x)
                )
            out.append(value.double().cpu().numpy())
        return np.concatenate(out) if out else np.zeros(0)

    @property
    def _nodes(self) -> int:
        return int(self.data.x.shape[0])

    def _through(self, graphs: int, index: Tensor, weight: Tensor) -> Tensor:
        x: Tensor = self.data.x
        batch = torch.arange(graphs, device=x.device).repeat_interleave(self._nodes)
        logits = self._call(self._model, x.repeat(graphs, 1), index.to(x.device), weight, batch)
        if logits.ndim != 2 or len(logits) != graphs:
            raise MethodError(
                "a readout of each graph",
                f"{graphs} graphs gave logits of shape {tuple(logits.shape)}",
                "a graph classifier that pools by batch: logits [graph, output]",
            )
        return self._value(logits)

    @property
    def inputs(self) -> Tensor:
        """Weights of the places, [1, place]."""
        return torch.from_numpy(np.arange(len(self._owner)) < len(self.units))[None].to(self.data.x)

    @property
    def unit_of(self) -> Tensor:
        """The unit of each place, [1, place]."""
        return torch.from_numpy(self._owner)[None]

    def forward(self, inputs: Tensor) -> Tensor:
        """value [batch] of weights [batch, place]; an edge's two messages share its weight."""
        graphs = len(inputs)
        twice = np.flatnonzero(self._both[self._owner] & (self._places[:, 0] != self._places[:, 1]))
        one = np.concatenate([self._places, self._places[twice][:, ::-1]])
        place = np.concatenate([np.arange(len(self._places)), twice])
        index = (one[None] + self._nodes * np.arange(graphs)[:, None, None]).reshape(-1, 2).T
        scale = torch.from_numpy(self._weight[self._owner[place]]).to(inputs)
        weight = inputs[:, torch.from_numpy(place).to(inputs.device)] * scale
        return self._through(graphs, torch.from_numpy(np.ascontiguousarray(index)), weight.reshape(-1))

    def background(self, n: int) -> Tensor:
        """``n`` graphs drawn anew, as weights of the places, [n, place]. Raises MethodError where the law or the places
        are not known: an edge drawn elsewhere could not be written down, and leaving it out would be a silent zero."""
        if not self._known or not callable(self._resample):
            raise MethodError(
                "graphs drawn anew as edge weights", "the law or the places of the edges are not known",
                "edge_question(..., resample=law, places=the ends that each edge may have)",
            )  # fmt: skip
        drawn = np.sort(self._drawn(np.zeros((n, len(self.units)), bool)))
        there = np.sort(self._places)
        weights = (drawn[:, self._owner] == there[None]).all(-1)
        if (weights.sum(1) != len(self.units)).any():
            raise MethodError("graphs drawn anew as edge weights", "an edge drawn to none of its places", "all places")
        return torch.from_numpy(weights).to(self.data.x)


def _value_of(target: int | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    if callable(target):
        return target

    def probability(logits: Tensor) -> Tensor:
        if logits.shape[1] == 1:
            return (logits[:, 0] if target else -logits[:, 0]).sigmoid()
        return logits.softmax(1)[:, target]

    return probability


def edge_question(
    model: Any, data: Data, target: int | Callable[[Tensor], Tensor], *, call: Call = _as_pyg,
    resample: Resample | str | None = None, places: Sequence[Sequence[tuple[int, int]]] | None = None,
    readout: str = "", names: Sequence[object] = (),
) -> EdgeQuestion:  # fmt: skip
    """A Question over the edges of one graph, ``data.x`` [node, feature] and ``data.edge_index`` [2, message].

    ``model(x, edge_index, edge_weight, batch)`` gives logits [graph, output]; ``call`` adapts one that is called in
    another way. ``target``: the class whose probability is asked for (one output: 0 or 1), or a function of the logits
    to [graph]. ``resample`` is the law that edges are drawn anew from, "drop" takes them out, None refuses to ask
    without them. ``places[unit]``: all ends that this edge may have, for ``background``. ``names`` name the stream of
    random numbers. Weights in ``data.edge_weight`` stay with their edges.

    Raises MethodError for a model in training mode, a graph without features, a second edge between the same nodes, two
    weights for one edge.
    """
    if getattr(model, "training", False):
        raise MethodError("a question to this model", "it is in training mode, where dropout answers", "model.eval()")
    if getattr(data, "x", None) is None:
        raise MethodError("a question over a graph's edges", "no node features", "data.x, [node, feature]")
    if isinstance(resample, str) and resample != DROP:
        raise MethodError(f"resample={resample!r}", "no such removal", f"a law to draw edges from, or {DROP!r}")
    what = readout or ("the readout" if callable(target) else f"probability of class {target}")
    if resample == DROP:
        what += " (edges dropped: outside the distribution)"
    named = tuple(names) or (what, data.edge_index.tolist())
    return EdgeQuestion(model, data, _value_of(target), what, call, resample, places, named)
