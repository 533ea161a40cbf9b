"""Any PyG graph classifier as a Question over edges: gradients, invariances, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from whence.errors import MethodError
from whence.models.graphs import DROP, EdgeQuestion, GraphNet, edge_question, undirected

# isort: split
# After our own import of it, which knows that PyG warns.
from torch_geometric.data import Data
from torch_geometric.nn import GCNConv, GraphConv, global_add_pool, global_mean_pool

ENDS = np.array([(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 0), (1, 4)])


class TwoGCN(torch.nn.Module):
    """Normalised by degree, tanh, mean pooling: another kind than GraphNet."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = GCNConv(3, 6), GCNConv(6, 2)

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor, batch: Tensor) -> Tensor:
        x = self.one(x, edge_index, edge_weight).tanh()
        return global_mean_pool(self.two(x, edge_index, edge_weight), batch)  # type: ignore[no-any-return]


class Matching(torch.nn.Module):
    """By hand: how many red nodes have a red neighbour. x_i' = relu(x_i + sum_j w_ij x_j - 1.5), summed, column red."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = GraphConv(3, 3)
        with torch.no_grad():
            self.conv.lin_rel.weight.copy_(torch.eye(3))
            self.conv.lin_rel.bias.fill_(-1.5)
            self.conv.lin_root.weight.copy_(torch.eye(3))

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor, batch: Tensor) -> Tensor:
        return global_add_pool(self.conv(x, edge_index, edge_weight).relu(), batch)  # type: ignore[no-any-return]


def data(order: Any = slice(None), dtype: torch.dtype = torch.float32) -> Data:
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    made = undirected(x, ENDS)
    made.x, made.edge_index = made.x.to(dtype), made.edge_index[:, order]
    return made


def nets(dtype: torch.dtype = torch.float32) -> list[Any]:
    torch.manual_seed(0)
    return [m.to(dtype).eval() for m in (GraphNet(3, 8, 2, names=("test",)), TwoGCN())]


def ring(keep: Any, rng: np.random.Generator) -> Any:
    """A law: each edge's second end is any node but the first."""
    far = (ENDS[:, 1] + 1 + rng.integers(4, size=keep.shape)) % 6
    far = np.where(far == ENDS[:, 0], (far + 1) % 6, far)
    return np.stack([np.broadcast_to(ENDS[:, 0], far.shape), far], -1)


def slope(question: EdgeQuestion) -> Tensor:
    weights = question.inputs.requires_grad_()
    return torch.autograd.grad(question.forward(weights).sum(), weights)[0][0]


# --- truth -----------------------------------------------------------------------------------------------------------


def test_the_edge_between_two_red_nodes_is_found_in_a_net_wired_to_see_it() -> None:
    # A ring: all degrees are equal; 0 and 1 are red, 2 and 3 green, 4 and 5 blue; the net reads red alone.
    x = np.repeat(np.eye(3, dtype=np.float32), 2, 0)
    model = Matching().eval()
    question = edge_question(model, undirected(x, ENDS[:6]), lambda logits: logits[:, 0], resample=DROP)
    keep = ~np.eye(6, dtype=bool)
    fall = question.ask(np.ones((1, 6), bool)) - question.ask(keep)
    assert question.units.labels[int(fall.argmax())] == "0-1"
    assert np.allclose(np.delete(fall, fall.argmax()), 0)
    assert slope(question).tolist() == pytest.approx([2, 0, 0, 0, 0, 0])
    green = edge_question(model, undirected(x, ENDS[:6]), lambda logits: logits[:, 1], resample=DROP)
    assert green.units.labels[int(slope(green).argmax())] == "2-3"


@pytest.mark.parametrize("which", [0, 1], ids=["GraphConv", "GCNConv"])
def test_gradients_of_edge_weights_equal_finite_differences(which: int) -> None:
    question = edge_question(nets(torch.double)[which], data(dtype=torch.double), 1)
    weights = 0.5 + torch.rand(3, len(ENDS), dtype=torch.double, generator=torch.Generator().manual_seed(1))
    analytic = torch.autograd.grad(question.forward(weights.requires_grad_()).sum(), weights)[0]
    step = 1e-6
    for k in range(len(ENDS)):
        move = torch.zeros(len(ENDS), dtype=torch.double)
        move[k] = step
        numeric = (question.forward(weights + move) - question.forward(weights - move)) / (2 * step)
        assert torch.allclose(numeric, analytic[:, k], atol=1e-8)
    assert analytic.abs().min() > 0


@pytest.mark.parametrize("which", [0, 1], ids=["GraphConv", "GCNConv"])
def test_an_edge_is_one_unit_of_two_messages(which: int) -> None:
    net, graph = nets()[which], data()
    messages = torch.ones(2 * len(ENDS), requires_grad=True)
    batch = torch.zeros(6, dtype=torch.long)
    value = net(graph.x, graph.edge_index, messages, batch).softmax(1)[:, 1].sum()
    (each,) = torch.autograd.grad(value, messages)
    question = edge_question(net, graph, 1)
    assert torch.allclose(slope(question), each[: len(ENDS)] + each[len(ENDS) :], atol=1e-6)
    assert question.ask(np.ones((1, len(ENDS)), bool))[0] == pytest.approx(value.item(), abs=1e-6)


# --- invariance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1], ids=["GraphConv", "GCNConv"])
def test_the_size_of_a_batch_changes_nothing(which: int) -> None:
    net = nets()[which]
    weights = torch.rand(7, len(ENDS), generator=torch.Generator().manual_seed(1))
    question = edge_question(net, data(), 0, resample=ring)
    assert torch.allclose(question.forward(weights), torch.cat([question.forward(w[None]) for w in weights]), atol=1e-6)
    keep = np.random.default_rng(1).random((700, len(ENDS))) < 0.5  # more than are sent through at once
    whole = question.ask(keep)
    again = edge_question(net, data(), 0, resample=lambda k, rng: np.resize(ring(keep, rng), (*keep.shape, 2)))
    assert np.allclose(whole, again.ask(keep), atol=1e-6)
    alone = question.values(np.broadcast_to(ENDS, (1, *ENDS.shape)), keep[:1])
    many = question.values(np.broadcast_to(ENDS, (700, *ENDS.shape)), keep)
    assert alone[0] == pytest.approx(many[0], abs=1e-6)


def test_the_order_of_edges_changes_nothing_but_the_order_of_units() -> None:
    order = np.random.default_rng(2).permutation(2 * len(ENDS))
    for net in nets():
        one, other = (edge_question(net, data(o), 0, resample=DROP) for o in (slice(None), order))
        n = len(ENDS)
        assert sorted(one.units.labels) == sorted(other.units.labels)
        assert one.units.labels != other.units.labels
        place = [other.units.find(label) for label in one.units.labels]
        assert np.allclose(one.ask(~np.eye(n, dtype=bool)), other.ask(~np.eye(n, dtype=bool))[place], atol=1e-6)
        assert torch.allclose(slope(one), slope(other)[place], atol=1e-6)


def test_an_edge_of_weight_zero_is_no_edge_for_sums_but_not_for_means() -> None:
    keep = ~np.eye(len(ENDS), dtype=bool)
    weights = torch.from_numpy(keep).float()
    summed = edge_question(nets()[0], data(), 0, resample=DROP)
    assert np.allclose(summed.ask(keep), summed.forward(weights).detach(), atol=1e-6)
    net = nets()[0]
    for conv in net.convs:
        conv.aggr_module = GraphConv(3, 3, aggr="mean").aggr_module
    averaged = edge_question(net, data(), 0, resample=DROP)
    assert not np.allclose(averaged.ask(keep), averaged.forward(weights).detach(), atol=1e-3)


# --- asking again -----------------------------------------------------------------------------------------------------


def test_without_a_law_no_edge_is_removed() -> None:
    question = edge_question(nets()[0], data(), 0)
    everything = np.ones((2, len(ENDS)), bool)
    assert np.ptp(question.ask(everything)) == 0
    with pytest.raises(MethodError, match="no law to draw edges anew"):
        question.ask(~np.eye(len(ENDS), dtype=bool))
    with pytest.raises(MethodError, match="resample=law"):
        question.background(3)


def test_what_leaves_the_distribution_is_called_by_name() -> None:
    question = edge_question(nets()[0], data(), 0, resample=DROP)
    assert "outside the distribution" in question.readout
    with pytest.raises(MethodError, match="places"):
        question.background(3)
    with pytest.raises(MethodError, match="no such removal"):
        edge_question(nets()[0], data(), 0, resample="zero")


def test_kept_edges_stay_whatever_the_law_says() -> None:
    seen: list[Any] = []

    def law(keep: Any, rng: np.random.Generator) -> Any:
        seen.append(keep)
        return np.zeros((*keep.shape, 2), int)

    question = edge_question(nets()[0], data(), 0, resample=law)
    value = question.ask(np.ones((1, len(ENDS)), bool))
    assert not seen
    keep = np.ones((1, len(ENDS)), bool)
    keep[0, 2] = False
    moved = np.array(ENDS)
    moved[2] = 0
    assert question.ask(keep) == pytest.approx(question.values(moved[None]))
    assert question.ask(keep) != pytest.approx(value)


def test_drawn_graphs_are_written_as_weights_of_places() -> None:
    places = [[(int(a), v) for v in range(6) if v != a] for a, _ in ENDS]
    question = edge_question(nets()[0], data(), 0, resample=ring, places=places, names=("drawn",))
    assert question.inputs.shape == (1, 5 * len(ENDS))
    assert question.inputs.sum() == len(ENDS)
    background = question.background(20)
    assert (torch.zeros(20, len(ENDS)).index_add_(1, question.unit_of[0], background) == 1).all()
    same = edge_question(nets()[0], data(), 0, resample=ring, places=places, names=("drawn",))
    asked = same.ask(np.zeros((20, len(ENDS)), bool))
    assert np.allclose(asked, question.forward(background).detach(), atol=1e-5)
    few = edge_question(nets()[0], data(), 0, resample=ring, places=[[] for _ in ENDS])
    with pytest.raises(MethodError, match="none of its places"):
        few.background(5)


# --- other models and graphs ------------------------------------------------------------------------------------------


def test_a_model_called_in_another_way_is_adapted() -> None:
    net = nets()[1]

    class Other(torch.nn.Module):
        def forward(self, graph: Data) -> Tensor:
            return net(graph.x, graph.edge_index, graph.edge_attr, graph.batch)  # type: ignore[no-any-return]

    def call(model: Any, x: Tensor, index: Tensor, weight: Tensor, batch: Tensor) -> Tensor:
        return model(Data(x=x, edge_index=index, edge_attr=weight, batch=batch))  # type: ignore[no-any-return]

    adapted = edge_question(Other().eval(), data(), 1, call=call)
    assert torch.equal(slope(adapted), slope(edge_question(net, data(), 1)))


def test_one_output_is_a_probability_of_yes() -> None:
    net = GraphNet(3, 8, 1, names=("one",)).eval()
    everything = np.ones((1, len(ENDS)), bool)
    yes, no = (edge_question(net, data(), t).ask(everything)[0] for t in (1, 0))
    assert yes + no == pytest.approx(1)
    assert yes != pytest.approx(0.5)


def test_weights_loops_and_one_way_edges_are_units_too() -> None:
    index = torch.tensor([[0, 1, 1, 2, 3], [1, 0, 2, 2, 0]])
    graph = Data(x=torch.eye(4)[:, :3], edge_index=index, edge_weight=torch.tensor([0.5, 0.5, 2.0, 1.0, 1.0]))
    net = nets()[0]
    question = edge_question(net, graph, 0, resample=DROP)
    assert question.units.labels == ("0-1", "1>2", "2>2", "3>0")
    value = net(graph.x, index, graph.edge_weight, torch.zeros(4, dtype=torch.long)).softmax(1)[0, 0].item()
    assert question.ask(np.ones((1, 4), bool))[0] == pytest.approx(value, abs=1e-6)
    assert question.forward(question.inputs).item() == pytest.approx(value, abs=1e-6)
    keep = ~np.eye(4, dtype=bool)
    assert np.allclose(question.ask(keep), question.forward(torch.from_numpy(keep).float()).detach(), atol=1e-6)


def test_it_says_what_it_cannot_ask() -> None:
    net = nets()[0]
    with pytest.raises(MethodError, match="training mode"):
        edge_question(GraphNet(3, 4, 2), data(), 0)
    with pytest.raises(MethodError, match="no node features"):
        edge_question(net, Data(edge_index=data().edge_index), 0)
    twice = data()
    twice.edge_index = torch.cat([twice.edge_index, twice.edge_index[:, :1]], 1)
    with pytest.raises(MethodError, match="two edges from 0 to 1"):
        edge_question(net, twice, 0)
    uneven = data()
    uneven.edge_weight = torch.arange(2.0 * len(ENDS))
    with pytest.raises(MethodError, match="one weight for both"):
        edge_question(net, uneven, 0)
    nodewise = edge_question(net, data(), 0, call=lambda m, x, i, w, b: m.convs[0](x, i, w))
    with pytest.raises(MethodError, match="pools by batch"):
        nodewise.ask(np.ones((1, len(ENDS)), bool))
