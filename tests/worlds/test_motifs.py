"""The world of graphs: planted answers hold on the trained net, and nothing without the net can tell arm from twin."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import networkx as nx  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from whence.engine.randomness import stream
from whence.models.graphs import edge_question, undirected
from whence.question import Metered
from whence.worlds.ground import ENDS, STILL, STRUCTURES, Draw, Planted, rows, subsets, trouble
from whence.worlds.motifs import OBSERVED, WORLD, learn, nets
from whence.worlds.motifs.scenes import EDGES, Scene, plan
from whence.worlds.trial import auc

KEYS = ("one", "two", "three")
Floats = NDArray[np.float64]


@cache
def drawn(key: str) -> Draw:
    return WORLD.draw(key)


def asked(structure: str, key: str = KEYS[0]) -> Planted:
    return next(p for p in WORLD.draw(key).planted if p.structure == structure)


def scored(p: Planted, scores: Any) -> float:
    return auc(np.asarray(scores, float), p.causes, frozenset(p.arm + p.twin) - p.causes)


# --- truth -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", WORLD.structures)
@pytest.mark.parametrize("key", KEYS)
def test_every_planted_answer_is_certified_on_the_net(key: str, structure: str) -> None:
    found = [p for p in drawn(key).planted if p.structure == structure]
    assert len(found) == 1
    assert trouble(found[0]) == ""


@pytest.mark.parametrize("structure", WORLD.structures)
def test_certification_refuses_an_answer_that_was_not_planted(structure: str) -> None:
    p = asked(structure)
    exchanged = Planted(p.name, structure, p.question, p.twin, p.arm, p.sibling, p.nulls)
    assert trouble(exchanged)


def gradient(question: Any) -> Floats:
    weights = question.inputs.requires_grad_()
    (slope,) = torch.autograd.grad(question.forward(weights).sum(), weights)
    return np.asarray(slope[0, : len(question.units)].abs(), float)


def redrawn(question: Any) -> Floats:
    n = len(question.units)
    keep = ~np.repeat(np.eye(n, dtype=bool), 8, 0)
    return np.asarray(1 - question.ask(keep).reshape(n, 8).mean(1))


@pytest.mark.parametrize("explain", [gradient, redrawn])
def test_simple_explainers_find_the_single_cause_on_both_sides(explain: Callable[[Any], Floats]) -> None:
    for key in KEYS:
        p = next(p for p in drawn(key).planted if p.structure == "single")
        for side in (p, p.mirrored()):
            assert scored(side, explain(Metered(side.question))) >= 0.95


def test_random_scores_and_an_untrained_net_do_not() -> None:
    p = asked("single")
    values = [scored(p, stream("random", i).random(EDGES)) for i in range(400)]
    assert abs(np.mean(values) - 0.5) < 0.1
    for null in p.nulls:
        assert gradient(null).max() < gradient(p.question).max() / 2


# --- what is visible without the net ----------------------------------------------------------------------------------


def graph_of(scene: Scene) -> tuple[nx.Graph, list[tuple[int, int]]]:
    ends = [tuple(map(int, e)) for e in scene.ends(scene.seen[None])[0]]
    graph = nx.Graph()
    graph.add_nodes_from(range(scene.plan.nodes))
    graph.add_edges_from(ends)
    return graph, ends  # type: ignore[return-value]


def degree(scene: Scene, x: Floats) -> list[float]:
    graph, ends = graph_of(scene)
    return [graph.degree[a] + graph.degree[b] for a, b in ends]


def position(scene: Scene, x: Floats) -> list[float]:
    return list(range(EDGES))


def betweenness(scene: Scene, x: Floats) -> list[float]:
    graph, ends = graph_of(scene)
    known = nx.edge_betweenness_centrality(graph)
    return [known.get((a, b), known.get((b, a), 0.0)) for a, b in ends]


def distance(scene: Scene, x: Floats) -> list[float]:
    graph, ends = graph_of(scene)
    far = nx.single_source_shortest_path_length(graph, nx.center(graph)[0])
    return [far[a] + far[b] for a, b in ends]


def node_names(scene: Scene, x: Floats) -> list[float]:
    return [a + b for a, b in graph_of(scene)[1]]


def norm(scene: Scene, x: Floats) -> list[float]:
    return [float(np.linalg.norm(x[[a, b]])) for a, b in graph_of(scene)[1]]


def column(scene: Scene, x: Floats) -> list[float]:
    return [float(x[[a, b]].argmax(1).max()) for a, b in graph_of(scene)[1]]


SCORERS = (degree, position, betweenness, distance, node_names, norm, column)
MANY = 120


@cache
def visible() -> list[tuple[str, Scene, Floats]]:
    """Graphs of many keys, for which no net is needed."""
    out = []
    for i in range(MANY):
        known = learn.roles(f"visible {i}", WORLD.structures)
        for structure, scene, _ in WORLD.scenes(f"visible {i}"):
            x = np.zeros((scene.plan.nodes, known.features))
            x[scene.node] = known.paint(scene.plan, structure)
            out.append((structure, scene, x))
    return out


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda f: f.__name__)
def test_a_scorer_that_never_asks_the_net_is_at_chance(scorer: Callable[[Scene, Floats], list[float]]) -> None:
    by: dict[str, list[float]] = {}
    for structure, scene, x in visible():
        half = scene.plan.slots // 2
        arm, twin = ([scene.unit(k) for k in range(*r)] for r in ((half,), (half, 2 * half)))
        causes = {arm[i] for s in (*STRUCTURES[structure].ends, *STRUCTURES[structure].keeps) for i in s}
        scores = np.array(scorer(scene, x))
        # Against the same roles in the twin arm: arm and twin are in the same states, role by role.
        same = [u for a, u in zip(arm, twin, strict=True) if a in causes]
        by.setdefault(structure, []).append(auc(scores, causes, same))
    everything = np.concatenate(list(by.values()))
    assert abs(everything.mean() - 0.5) < 3 * everything.std() / len(everything) ** 0.5 + 1e-9
    for structure, values in by.items():
        assert abs(np.mean(values) - 0.5) < 3.5 * np.std(values) / len(values) ** 0.5 + 1e-9, structure


def test_the_scorers_do_see_the_graph() -> None:
    """Slots are found among all edges by their colours, but not which of them decides."""
    found = []
    for _, scene, x in visible():
        slots = [scene.unit(k) for k in range(scene.plan.slots)]
        base = [k for k in range(EDGES) if k not in slots and scene.plan.owners[scene.edge[k]] < scene.plan.base]
        found.append(auc(np.array(column(scene, x)), slots, base))
    assert np.mean(found) == 1


def test_arm_and_twin_are_in_the_same_states_and_the_asked_ones() -> None:
    for structure, scene, _ in visible():
        states = scene.plan.states(scene.seen[None])[0].tolist()
        half = len(states) // 2
        assert states[:half] == states[half:]
        assert tuple(states[:half]) in [case for case, _ in OBSERVED[structure]]


# --- the law of the graphs --------------------------------------------------------------------------------------------


def test_what_is_drawn_anew_is_a_graph_of_the_same_law() -> None:
    for i in range(12):
        rng = stream("law", i)
        p = plan(rng, 4 if i % 2 else 2)
        seen = p.draw(rng, np.zeros((1, EDGES), bool))[0]
        keep = rng.random((40, EDGES)) < 0.5
        for choice, kept in zip(p.draw(rng, keep, seen), keep, strict=True):
            assert (choice[kept] == seen[kept]).all()
            graph = nx.Graph(p.ends(choice[None])[0].tolist())
            assert graph.number_of_edges() == EDGES
            assert nx.is_connected(graph)
            assert len(graph) == p.nodes
        other = np.where(rng.random((40, EDGES)) < 0.5, p.opposite(rng, seen), seen)
        assert all(nx.Graph(e.tolist()).number_of_edges() == EDGES for e in p.ends(other))


def test_drawing_some_edges_anew_leaves_the_distribution_as_it_is() -> None:
    rng = stream("gibbs")
    p = next(q for q in (plan(rng, 4) for _ in range(50)) if q.second)
    before = p.draw(rng, np.zeros((20_000, EDGES), bool))
    second = p.base - 1
    first = int(p.rivals[second])
    pair = [first, second]
    after = before
    for edge in (first, second, int(p.deciding[0]), 0):
        keep = np.ones(before.shape, bool)
        keep[:, edge] = False
        after = p.draw(rng, keep, after)
    size = int(p.sizes[first])
    for choices in (before, after):
        assert abs(p.states(choices).mean(0) - 0.5).max() < 0.02
        counts = np.zeros((size, size))
        np.add.at(counts, tuple(choices[:, pair].T), 1)
        assert np.diag(counts).sum() == 0
        even = len(choices) / (size * (size - 1))
        assert abs(counts[~np.eye(size, dtype=bool)] / even - 1).max() < 0.12


def test_swaps_are_opposite_states_and_twice_is_as_observed() -> None:
    for _, scene, _ in visible()[:60]:
        one = scene.swapped(np.eye(EDGES, dtype=bool))
        seen = scene.ends(scene.seen[None])[0]
        for unit in range(EDGES):
            assert (np.delete(one[unit], unit, 0) == np.delete(seen, unit, 0)).all()
        for slot in range(scene.plan.slots):
            edge = scene.plan.deciding[slot]
            assert (scene.seen[edge] == scene.plan.base) != (scene.other[edge] == scene.plan.base)
        moved = (one[np.arange(EDGES), np.arange(EDGES)] != seen).any(-1)
        assert moved.sum() >= EDGES - 1  # base node 1 has one place only


# --- role swap, nulls, repetition -------------------------------------------------------------------------------------


def output_of(number: int, outcome: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda logits: (logits[:, number] if outcome else -logits[:, number]).sigmoid()


def test_the_sibling_is_the_same_net_with_the_two_colours_exchanged() -> None:
    known, net, _ = nets(KEYS[0], WORLD.structures)
    for p in drawn(KEYS[0]).planted:
        number = list(known.colours).index(p.structure)
        question: Any = p.question
        x = question.data.x[:, known.exchanged(p.structure)]
        painted = edge_question(
            net,
            undirected(x.numpy(), np.array([m[0] for m in question.units.members])),
            output_of(number, OBSERVED[p.structure][0][1]),
        )
        sibling: Any = p.sibling
        weights = torch.rand(5, EDGES, generator=torch.Generator().manual_seed(0))
        padded = torch.cat([weights, torch.zeros(5, sibling.inputs.shape[1] - EDGES)], 1)
        assert torch.allclose(painted.forward(weights), sibling.forward(padded), atol=1e-6)
        assert not torch.allclose(painted.forward(weights), question.forward(padded), atol=1e-2)
        assert (sibling.data.x == question.data.x).all()
        assert sibling.units == question.units


def test_nulls_are_still_where_the_net_is_not() -> None:
    for p in drawn(KEYS[1]).planted:
        which = np.concatenate([np.eye(EDGES, dtype=bool), rows(subsets(p.arm + p.twin), EDGES)])
        seen = np.ones((1, EDGES), bool)
        for null in p.nulls:
            assert abs(null.swap(which) - null.ask(seen)).max() < STILL / 2
        assert abs(p.question.swap(which) - p.question.ask(seen)).max() > ENDS


def test_the_same_key_gives_the_same_bits_and_another_key_another_world() -> None:
    keep = stream("rows").random((20, EDGES)) < 0.5
    first, again = ([p.question.ask(keep) for p in WORLD.draw(KEYS[2]).planted] for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    known, net, _ = nets(KEYS[2], WORLD.structures)
    afresh, _ = learn.trained(KEYS[2], known)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), afresh.parameters(), strict=True))
    here, there = (learn.roles(k, WORLD.structures).colours for k in KEYS[:2])
    assert here != there
    assert drawn(KEYS[0]).planted[0].question.units != drawn(KEYS[1]).planted[0].question.units


# --- asking -----------------------------------------------------------------------------------------------------------


def test_rows_are_independent_of_how_they_are_batched() -> None:
    keep = stream("rows").random((24, EDGES)) < 0.5
    for structure in ("single", "xor"):
        whole = asked(structure).question.ask(keep)
        parts: Any = asked(structure).question
        split = np.concatenate([parts.ask(keep[:1]), parts.ask(keep[1:9]), parts.ask(keep[9:])])
        assert np.allclose(whole, split, atol=1e-6)
        assert whole.std() > 0.1


def test_edge_weights_say_what_asking_says() -> None:
    for p in drawn(KEYS[0]).planted:
        q: Any = p.question
        assert (q.inputs[0, :EDGES] == 1).all()
        assert (q.inputs[0, EDGES:] == 0).all()
        assert (q.unit_of[0, :EDGES] == torch.arange(EDGES)).all()
        assert torch.allclose(q.forward(q.inputs).double(), torch.from_numpy(q.ask(np.ones((1, EDGES), bool))))
        background = q.background(64)
        per_unit = torch.zeros(64, EDGES).index_add_(1, q.unit_of[0], background)
        assert (per_unit == 1).all()
        # One drawn graph, by its weights and by its edges.
        places = [m for unit in q._scene.places for m in unit[:1]]
        places += [m for unit in q._scene.places for m in unit[1:]]
        ends = np.array([[places[i] for i in row.nonzero()[:, 0].tolist()] for row in background])
        by_unit = np.array(
            [e[q.unit_of[0][row > 0].argsort().numpy()] for e, row in zip(ends, background, strict=True)]
        )
        assert np.allclose(q._asked.values(by_unit), q.forward(background), atol=1e-5)
