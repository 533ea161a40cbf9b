"""What the methods keep of examples and how they score it: against autograd and dense numpy, resumed, and restored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from planted import close, found, loss_gradients, rescored, small, whole
from torch import nn

from whence.engine.codes import Numbers
from whence.engine.gradients import GradientBank
from whence.engine.influence import Memory
from whence.engine.project import Projection, folded
from whence.engine.schemes import Rows
from whence.errors import RunError
from whence.influence.datainf import DataInf
from whence.influence.ekfac import EKFAC
from whence.influence.eogp import EOGP
from whence.influence.grad_dot import GradDot
from whence.influence.logra import LoGRA
from whence.influence.lorif import LoRIF
from whence.influence.sketch import Sketch, Staged
from whence.influence.tracin import TracIn
from whence.influence.trak import TRAK
from whence.models.objectives import ClassifierObjective
from whence.objective import Listed, Losses

METHODS: dict[str, Any] = {
    "grad_dot": GradDot(),
    "logra": LoGRA(size=3),
    "logra in float16": LoGRA(size=3, keep="float16"),
    "logra at random": LoGRA(size=3, init="random"),
    "lorif": LoRIF(),
    "lorif of rank 3": LoRIF(rank=3),
    "eogp": EOGP(bits=24),
    "sketch": Sketch(64),
    "sketch in int8": Sketch(64, "int8"),
    "tracin": TracIn(),
    "trak": TRAK(size=16),
    "datainf": DataInf(),
}

# -- against dense formulas --------------------------------------------------------------------------------------------


def test_grad_dot_is_the_inner_product_of_autograds_gradients() -> None:
    objective, examples, queries = small()
    rows, asked = whole(loss_gradients(objective, examples.items)), whole(loss_gradients(objective, queries))
    assert close(GradDot().fit(objective, examples).scores(queries), asked @ rows.T, 1e-3)


def preconditioned(asked: Mapping[str, Any], rows: Mapping[str, Any], damping: Mapping[str, float]) -> np.ndarray:
    """sum over layers of g_q' (mean g g' + lambda)^-1 g_i."""
    total: Any = 0.0
    for name, g in rows.items():
        fisher = g.T @ g / len(g) + damping[name] * np.eye(g.shape[1])
        total = total + asked[name] @ np.linalg.solve(fisher, g.T)
    return np.asarray(total)


def shares(rows: Mapping[str, Any], share: float) -> dict[str, float]:
    return {name: share * float((g**2).sum(1).mean()) / g.shape[1] for name, g in rows.items()}


@pytest.mark.parametrize(("keep", "error"), [("float16", 2e-3), ("int8", 5e-2)])
def test_logra_that_projects_nothing_is_the_dense_influence_function(keep: str, error: float) -> None:
    objective, examples, queries = small(60)
    rows, asked = loss_gradients(objective, examples.items), loss_gradients(objective, queries)
    given = LoGRA(size=100, damping=0.3, keep=keep).fit(objective, examples).scores(queries)
    assert close(given, preconditioned(asked, rows, shares(rows, 0.3)), error)


def projected(gradients: Mapping[str, Any], size: int, seed: int = 0) -> dict[str, np.ndarray]:
    """P_out' G P_in of whole gradients, [example, size x size]."""
    made, projection = {}, Projection(size, seed)
    for name, (out, inp) in {"0": (4, 6), "2": (3, 5)}.items():
        g = gradients[name].reshape(-1, out, inp)
        for side, full in (("out", out), ("in", inp)):
            p = projection.side(name, side, full, min(full, size))
            if p is not None:
                g = np.einsum("noi,op->npi", g, p.numpy()) if side == "out" else np.einsum("noi,ip->nop", g, p.numpy())
        made[name] = g.reshape(len(g), -1)
    return made


def test_logra_on_projected_gradients_is_the_dense_influence_function_of_these() -> None:
    objective, examples, queries = small(60)
    rows, asked = (projected(loss_gradients(objective, part), 3) for part in (examples.items, queries))
    given = LoGRA(size=3, damping=0.3, keep="float16", init="random").fit(objective, examples).scores(queries)
    assert close(given, preconditioned(asked, rows, shares(rows, 0.3)), 2e-3)


@pytest.mark.parametrize("size", [3, 100])
def test_lorif_of_full_rank_is_the_dense_woodbury_formula_on_the_same_projections(size: int) -> None:
    objective, examples, queries = small(60)
    rows, asked = (projected(loss_gradients(objective, part), size) for part in (examples.items, queries))
    fitted = LoRIF(rank=9, size=size, damping=0.2).fit(objective, examples)
    total: Any = 0.0
    for name, g in rows.items():
        damping = 0.2 * (g**2).sum() / g.shape[1]
        total = total + asked[name] @ np.linalg.solve(g.T @ g + damping * np.eye(g.shape[1]), g.T)
    assert close(fitted.scores(queries), total, 3e-2)  # factors are bfloat16
    # Of the rows as they are kept, exactly: no rounding lies between.
    kept = fitted.scheme.codec.decode(next(iter(fitted.shelf.blocks("factors")))[1])
    total = 0.0
    for name, x in kept.items():
        g = x.flatten(1).double().numpy()
        damping = 0.2 * (g**2).sum() / g.shape[1]
        total = total + asked[name] @ np.linalg.solve(g.T @ g + damping * np.eye(g.shape[1]), g.T)
    assert close(fitted.scores(queries), total, 1e-4)


def test_a_lower_rank_of_lorif_is_further_from_all_of_the_gradient() -> None:
    objective, examples, queries = small(60)
    rows, asked = loss_gradients(objective, examples.items), loss_gradients(objective, queries)
    exact = preconditioned(asked, rows, shares(rows, 0.2)) / len(examples)
    found = [
        np.corrcoef(LoRIF(rank=c, damping=0.2).fit(objective, examples).scores(queries).ravel(), exact.ravel())[0, 1]
        for c in (1, 3)
    ]
    assert found[1] > 0.999
    assert found[0] > 0.9


class Chosen:
    """A linear layer whose incoming and outgoing numbers are chosen freely: an example is (a, g), its loss g' W a."""

    name = "chosen"

    def __init__(self, inp: int, out: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.module: nn.Module = nn.Linear(inp, out, bias=False)

    def losses(self, examples: Sequence[Any]) -> Losses:
        a, g = (torch.tensor(np.stack([e[i] for e in examples])) for i in (0, 1))
        return Losses((self.module(a) * g).sum(1))

    def sampled(self, examples: Sequence[Any], seed: int) -> Losses:
        return self.losses(examples)

    def fingerprint(self) -> str:
        return "chosen"


def test_ekfac_is_the_dense_fisher_where_what_goes_in_and_what_comes_back_are_independent() -> None:
    rng = np.random.default_rng(0)
    ins, outs = rng.normal(size=(8, 5)), rng.normal(size=(6, 3))
    pairs = tuple((a.astype(np.float32), g.astype(np.float32)) for a in ins for g in outs)  # each with each
    objective = Chosen(5, 3)
    given = EKFAC(sampled=False).fit(objective, Listed(pairs)).scores(list(pairs[:3]))
    rows = np.stack([np.outer(g, a).ravel() for a, g in pairs]).astype(float)
    fisher = rows.T @ rows / len(rows)
    damped = fisher + 0.1 * np.trace(fisher) / len(fisher) * np.eye(len(fisher))
    assert close(given, rows[:3] @ np.linalg.solve(damped, rows.T), 1e-4)


def softmax_layer() -> tuple[ClassifierObjective, Listed]:
    """A trained linear classifier of three overlapping classes."""
    rng = np.random.default_rng(3)
    middle = rng.normal(size=(3, 6))
    items = tuple(
        ((middle[i % 3] + rng.normal(size=6)).astype(np.float32), i % 3 if rng.random() < 0.9 else int(rng.integers(3)))
        for i in range(240)
    )
    model = nn.Linear(6, 3)
    x, y = torch.tensor(np.stack([x for x, _ in items])), torch.tensor([y for _, y in items])
    optimiser = torch.optim.LBFGS(model.parameters(), max_iter=50)

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        value = nn.functional.cross_entropy(model(x), y) + 0.01 * model.weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    return ClassifierObjective(model), Listed(items)


def test_ekfac_on_one_softmax_layer_is_near_the_dense_fisher_and_nearer_than_no_curvature() -> None:
    objective, examples = softmax_layer()
    queries = list(examples.items[:12])
    given = EKFAC().fit(objective, examples).scores(queries)
    x = np.stack([np.append(x, 1) for x, _ in examples.items]).astype(float)
    with torch.no_grad():
        p = objective.module(torch.tensor(x[:, :-1], dtype=torch.float32)).softmax(1).double().numpy()
    fisher = np.mean(
        [np.kron(np.diag(q) - np.outer(q, q), np.outer(v, v)) for q, v in zip(p, x, strict=True)], 0
    )  # over the labels that the model may draw, exactly
    damped = fisher + 0.1 * np.trace(fisher) / len(fisher) * np.eye(len(fisher))
    rows = np.stack([np.outer(q - np.eye(3)[y], v).ravel() for q, v, (_, y) in zip(p, x, examples.items, strict=True)])
    dense, plain = rows[:12] @ np.linalg.solve(damped, rows.T), rows[:12] @ rows.T
    near = np.corrcoef(given.ravel(), dense.ravel())[0, 1]
    # Classes that are surer of some inputs than of others tie what comes back to what goes in: no Kronecker product.
    assert near > 0.8
    assert near > np.corrcoef(plain.ravel(), dense.ravel())[0, 1] + 0.1


def wide(n: int = 300) -> tuple[ClassifierObjective, Listed, list[Any]]:
    """More weights than the small one: bits have something to carry."""
    rng = np.random.default_rng(7)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 6))
    items = [(rng.normal(size=12).astype(np.float32), int(rng.integers(6))) for _ in range(n + 8)]
    return ClassifierObjective(model), Listed(tuple(items[:n]), tuple(map(str, range(n)))), items[n:]


def test_eogp_s_signs_keep_the_whitened_inner_products_and_more_bits_keep_more() -> None:
    objective, examples, queries = wide()
    rows, asked = loss_gradients(objective, examples.items), loss_gradients(objective, queries)
    exact = preconditioned(asked, rows, shares(rows, 0.3))
    found = {
        bits: float(
            np.corrcoef(EOGP(bits=bits, damping=0.3).fit(objective, examples).scores(queries).ravel(), exact.ravel())[
                0, 1
            ]
        )
        for bits in (16, 64, 256)
    }
    assert found[256] > 0.8
    assert found[16] < found[64] < found[256]


def test_eogp_s_scores_are_by_whitened_coordinates_one_sign_and_one_scale() -> None:
    objective, examples, queries = wide(120)
    fitted = EOGP(bits=64, damping=0.3).fit(objective, examples)
    scheme: Any = fitted.scheme
    sides = [fitted.bank.gradients(list(part)) for part in (examples.items, queries)]
    x, q = (scheme.features(gradients)["all"].double().numpy() for gradients in sides)
    assert x.shape[1] <= 64 + 8
    true = q @ np.sign(x).T * np.abs(x).mean(1)
    assert close(fitted.scores(queries), true, 0.02)  # the scan quantises the query


def test_a_sketch_that_drops_nothing_is_the_dense_fisher_s_score() -> None:
    rng = np.random.default_rng(0)
    ins, outs = rng.normal(size=(8, 5)), rng.normal(size=(6, 3))
    pairs = tuple((a.astype(np.float32), g.astype(np.float32)) for a in ins for g in outs)  # each with each
    given = Sketch(16, "float16", damping=0.1).fit(Chosen(5, 3), Listed(pairs)).scores(list(pairs[:3]))
    rows = np.stack([np.outer(g, a).ravel() for a, g in pairs]).astype(float)
    fisher = rows.T @ rows / len(rows)
    damped = fisher + 0.1 * np.trace(fisher) / len(fisher) * np.eye(len(fisher))
    assert close(given, rows[:3] @ np.linalg.solve(damped, rows.T), 2e-3)


def test_a_sketch_keeps_more_of_ekfac_s_scores_the_more_numbers_it_has() -> None:
    objective, examples, queries = wide()
    exact = EKFAC(sampled=False).fit(objective, examples).scores(queries).ravel()
    for keep in ("int8", "bits"):
        near = {
            n: np.corrcoef(Sketch(n, keep, damping=0.1).fit(objective, examples).scores(queries).ravel(), exact)[0, 1]
            for n in (16, 128, 2048)
        }
        assert near[16] < near[128] < near[2048], keep
        assert near[2048] > 0.9, keep


class Words(nn.Module):
    """Words looked up, put together and judged."""

    def __init__(self, words: int = 200) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.table, self.judge = nn.Embedding(words, 8), nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.judge(torch.tanh(self.table(ids).mean(1)))
        return out


def read(n: int = 300, words: int = 200) -> tuple[ClassifierObjective, Listed, list[Any]]:
    """Texts of six words, most of them of the few that are frequent."""
    rng = np.random.default_rng(1)
    share = 1 / np.arange(1, words + 1)
    items = [(rng.choice(words, 6, p=share / share.sum()), int(rng.integers(3))) for _ in range(n + 40)]
    return ClassifierObjective(Words(words)), Listed(tuple(items[:n]), tuple(map(str, range(n)))), items[n:]


def test_the_mass_of_a_table_s_rows_is_what_autograd_gives_each() -> None:
    objective, examples, _ = read(12)
    alone = [(ids[:1], y) for ids, y in examples.items]  # one word each: nothing is summed before it is squared
    bank = GradientBank(objective, ("table",))
    ((layer, mass, s),) = bank.tables(alone)
    rows = bank.gradients(alone)["table"]
    assert layer.name == "table"
    assert torch.allclose(mass, rows.pow(2).sum((0, 2)), rtol=1e-4)
    assert torch.allclose(s, torch.einsum("nwi,nwj->ij", rows, rows), atol=1e-7, rtol=1e-4)


def test_a_table_of_few_words_stays_whole_and_one_of_many_is_added_up_row_by_row() -> None:
    objective, examples, queries = read()
    exact = EKFAC(sampled=False).fit(objective, examples).scores(queries)
    near = {}
    for size in (0, 64):
        fitted = Sketch(8192, "float16", size=size).fit(objective, examples)
        near[size] = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(fitted.scores(queries), exact, strict=True)])
        assert fitted.bank.shapes["table"] == (size or 200, 8)
        if size:
            p_out, p_in = (fitted.bank.projection.side("table", which, 0, 0) for which in ("out", "in"))
            assert ((p_out != 0).sum(1) == 1).all()  # each word in one place
            masses = next(iter(GradientBank(objective, ("table",)).tables(list(examples.items[:64]))))[1]
            assert p_out.abs().sum(1)[masses.argmin()] > 2 * p_out.abs().sum(1)[masses.argmax()]
            assert torch.allclose(p_in.T @ p_in, torch.eye(8), atol=1e-5)
    assert near[0] > 0.8
    assert near[64] > 0.4


def test_folding_keeps_inner_products_in_the_mean_and_leaves_narrow_rows_alone() -> None:
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.normal(size=(2, 1000)) + 1)
    true = float(x[0] @ x[1])
    found = [float(torch.prod(folded(x, 64, "t", seed), 0).sum()) for seed in range(300)]
    assert abs(np.mean(found) - true) < 3 * np.std(found) / 300**0.5
    assert np.std(found) > 1
    assert torch.equal(folded(x, 1000, "t"), x)
    assert torch.equal(folded(x, 64, "t", 3), folded(x, 64, "t", 3))


def test_what_is_staged_is_one_sketch_in_two_forms() -> None:
    objective, examples, queries = wide(120)
    single = Sketch(256, "int8").fit(objective, examples)
    staged = Staged(single.bank.shapes, 192, 256)
    gradients = single.bank.gradients(list(examples.items))
    staged.learn(gradients)
    codes, asked = staged.encode(gradients), staged.prepare(single.bank.gradients(queries))
    assert staged.planes == {"bits": 2 + 192 // 8, "sketch": 2 + 256} == {p: c.shape[1] for p, c in codes.items()}
    assert close(staged.score(asked, codes), single.scores(queries), 1e-5)
    # Each part by itself, as a process that only scans has it: the same numbers.
    small = staged.small.prepare(single.bank.gradients(queries))
    coarse = staged.small.score(asked[0], codes)
    assert np.array_equal(staged.small.score(small, codes), coarse)
    assert np.corrcoef(coarse.ravel(), single.scores(queries).ravel())[0, 1] > 0.6
    fresh = Staged(single.bank.shapes, 192, 256)
    fresh.restore(staged.tensors())
    assert np.array_equal(fresh.encode(gradients)["sketch"], codes["sketch"])


@pytest.mark.parametrize(("method", "named"), [(Sketch(4), "4 numbers"), (Sketch(keep="float4"), "float4")])
def test_a_sketch_that_cannot_be_is_refused(method: Any, named: str) -> None:
    with pytest.raises(RunError, match=named):
        method.fit(*small(60)[:2])


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "error"), [("float16", 2**-10), ("int8", 1 / 200)])
def test_a_row_comes_back_as_it_was_up_to_its_rounding(keep: str, error: float) -> None:
    objective, examples, _ = small()
    fitted = LoGRA(size=100, keep=keep).fit(objective, examples)
    back = fitted.scheme.codec.decode(next(iter(fitted.shelf.blocks("gradients")))[1])
    for name, g in loss_gradients(objective, examples.items).items():
        off = np.abs(back[name].flatten(1).numpy() - g).max(1)
        assert (off <= error * np.abs(g).max(1) + 1e-12).all()


def test_very_small_and_very_large_gradients_are_kept_as_well() -> None:
    objective, examples, queries = small()
    for factor in (1e-9, 1e9):

        class Scaled(ClassifierObjective):
            def losses(self, part: Sequence[Any], by: float = factor) -> Losses:
                return Losses(super().losses(part).values * by)

        plain = LoGRA(size=3, damping=0.3).fit(objective, examples).scores(queries)
        scaled = LoGRA(size=3, damping=0.3).fit(Scaled(objective.module), examples).scores(queries)
        assert close(scaled, plain, 0.03), factor  # whitening takes the size out


# -- a pass ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stopping(Listed):
    """Examples whose reader is stopped once so many are on the shelf."""

    shelf: Any = None
    at: int = 32

    def __getitem__(self, number: int, /) -> Any:
        if self.shelf.done >= self.at:
            raise KeyboardInterrupt
        return super().__getitem__(number)


def planes_of(fitted: Any) -> dict[str, np.ndarray]:
    return {p: np.concatenate([codes for _, codes in fitted.shelf.blocks(p)]) for p in fitted.scheme.planes}


@pytest.mark.parametrize("name", METHODS)
def test_a_pass_that_was_stopped_goes_on_to_the_same_bytes(name: str) -> None:
    objective, examples, queries = small(60)
    method, shelf = METHODS[name], Memory()
    straight = method.fit(objective, examples)
    with pytest.raises(KeyboardInterrupt):
        method.fit(objective, Stopping(examples.items, examples.labels, shelf), shelf)
    assert shelf.done == 32
    resumed = method.fit(objective, examples, shelf)
    assert shelf.done == 60
    one, other = planes_of(straight), planes_of(resumed)
    assert {p: rows.shape for p, rows in one.items()} == {p: (60, n) for p, n in straight.scheme.planes.items()}
    for plane, rows in one.items():
        assert np.array_equal(rows, other[plane]), plane
    assert np.array_equal(straight.scores(queries), resumed.scores(queries))


@pytest.mark.parametrize("name", METHODS)
def test_what_was_learned_goes_to_a_scheme_that_knows_nothing(name: str) -> None:
    objective, examples, queries = small(60)
    method = METHODS[name]
    fitted = method.fit(objective, examples)
    kind = type(fitted.scheme)
    shapes = fitted.bank.shapes
    makes = {"grad_dot": lambda: Rows(Numbers(shapes, "float16")), "tracin": lambda: kind(shapes, (1.0,))}
    fresh = makes.get(name, lambda: kind(shapes, method))()
    fresh.restore({k: v.copy() for k, v in fitted.scheme.tensors().items()})
    assert fresh.planes == fitted.scheme.planes
    assert close(replace(fitted, scheme=fresh).scores(queries), fitted.scores(queries), 1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_scores_depend_neither_on_the_batch_nor_on_the_other_queries(name: str) -> None:
    objective, examples, queries = small(60)
    method = METHODS[name]
    fitted = method.fit(objective, examples)
    given, kind, shapes = fitted.scores(queries), type(fitted.scheme), fitted.bank.shapes
    makes = {"grad_dot": lambda: Rows(Numbers(shapes, "float16")), "tracin": lambda: kind(shapes, (1.0,))}
    again = rescored(fitted, makes.get(name, lambda: kind(shapes, method))(), 7, queries)
    # A gradient on the edge between two codes may fall to either side.
    assert np.corrcoef(again.ravel(), given.ravel())[0, 1] > 0.999
    alone = np.concatenate([fitted.scores([q]) for q in queries])
    assert close(alone, given, 0.02 if name in ("eogp", "sketch") else 1e-4)  # the scan quantises the query


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bad", [5, 0])
def test_examples_that_give_no_number_are_named_and_score_nothing(name: str, bad: int) -> None:
    objective, examples, queries = small(60)
    items = list(examples.items)
    items[bad] = (np.full(5, np.nan, np.float32), 1)
    fitted = METHODS[name].fit(objective, Listed(tuple(items), examples.labels))
    assert fitted.skipped == (bad,)
    assert f"example {bad}" in " ".join(fitted.notes)
    given = fitted.scores(queries)
    assert np.isfinite(given).all()
    assert (given[:, bad] == 0).all()
    assert (given[:, 6:] != 0).all()
    assert fitted.explain(queries[0]).notes == fitted.notes
    with pytest.raises(RunError, match="the query 1"):
        fitted.scores([queries[0], items[bad]])


@pytest.mark.parametrize("name", ["grad_dot", "eogp", "trak"])
def test_a_set_without_one_finite_gradient_is_one_clear_error(name: str) -> None:
    objective, examples, _ = small()
    broken = Listed(tuple((np.full(5, np.nan, np.float32), y) for _, y in examples.items))
    with pytest.raises(RunError):
        METHODS[name].fit(objective, broken)
    with pytest.raises(RunError, match="there is none"):
        METHODS[name].fit(objective, Listed(()))


@pytest.mark.parametrize("name", ["logra", "lorif", "eogp", "sketch", "ekfac"])
def test_curvature_finds_the_planted_examples_too(name: str) -> None:
    methods: dict[str, Any] = {"logra": LoGRA(damping=0.1), "lorif": LoRIF(), "eogp": EOGP(damping=0.1)}
    method = (methods | {"sketch": Sketch(), "ekfac": EKFAC()})[name]
    assert np.mean(found(method)) >= 0.9
