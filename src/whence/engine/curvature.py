"""Curvature: what an inner product of gradients has to be divided by.

* :class:`Moments`: second moments of (projected) gradients, F = mean g g', a block for each layer (empirical Fisher).
* :class:`KroneckerFisher`: the Fisher's Kronecker factors A = E[a a'], S = E[g g'] with targets drawn from the model,
  their eigenbases, and in these the eigenvalues put right: Lambda = E[(Q_S' G Q_A)^2] (George et al. 2018; Grosse et
  al. 2023).
* :func:`truncated`: the leading right singular vectors of rows that are only ever seen shard by shard.
* :func:`damping`: lambda of each block by a held-out criterion. Gradients are read as draws of N(0, F + lambda I): F is
  taken of one part, and the lambda is kept under which the other part is most likely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import RunError
from .gradients import GradientBank
from .progress import progress
from .project import largest
from .randomness import torch_stream

GRID = tuple(10.0 ** (e / 2) for e in range(-8, 5))
"""Dampings that are tried, as shares of a block's mean eigenvalue: 1e-4 to 100."""
HELD = 4
"""Every HELD-th example is held back to choose the damping."""


class Moments:
    """Running second moments of gradients, apart for the examples held back.

    ``seen`` examples; ``blocks``[layer]: sum of g g' [D, D], of every example; ``held`` the part of it held back.
    """

    def __init__(self) -> None:
        self.seen = 0
        self.kept = 0
        self.blocks: dict[str, Tensor] = {}
        self.held: dict[str, Tensor] = {}

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        """Gradients [example, ...] of each layer, in the order of the examples."""
        n = len(next(iter(gradients.values())))
        back = (torch.arange(self.seen, self.seen + n) % HELD) == HELD - 1
        for name, g in gradients.items():
            flat = g.flatten(1).double()
            if name not in self.blocks:
                d = flat.shape[1]
                self.blocks[name], self.held[name] = flat.new_zeros(d, d), flat.new_zeros(d, d)
            self.blocks[name] += flat.T @ flat
            own = flat[back.to(flat.device)]
            self.held[name] += own.T @ own
        self.seen += n
        self.kept += int(back.sum())

    def eigen(self) -> dict[str, tuple[Tensor, Tensor]]:
        """layer -> (eigenvalues [D] descending, eigenvectors [D, D] as columns) of F."""
        found = {}
        for name, block in self.blocks.items():
            values, vectors = torch.linalg.eigh(block / self.seen)
            found[name] = values.flip(0).clamp_min(0), vectors.flip(1)
        return found

    def damping(self) -> dict[str, float]:
        """lambda of each layer by the held-out criterion; the mean eigenvalue where too few examples were seen."""
        found = {}
        for name, block in self.blocks.items():
            mean = float(block.trace() / self.seen / len(block))
            if self.kept < 8:
                found[name] = mean
                continue
            fitted = (block - self.held[name]) / (self.seen - self.kept)
            values, vectors = torch.linalg.eigh(fitted)
            there = (vectors * (self.held[name] / self.kept @ vectors)).sum(0)
            found[name] = damping(values.clamp_min(0), there)
        return found


def damping(values: Tensor, held: Tensor, grid: Sequence[float] = GRID) -> float:
    """The lambda under which held-out gradients are most likely: ``values``[j], variances along the eigenvectors of
    the part that was fitted, ``held``[j], mean squares of the other part along the same.

    >>> damping(torch.tensor([4.0, 0.0]), torch.tensor([4.1, 0.1])) < damping(torch.tensor([4.0, 0.0]), torch.ones(2))
    True
    """
    mean = float(values.mean())
    if not mean > 0:
        return 1.0
    scores = [float((torch.log(values + r * mean) + held / (values + r * mean)).sum()) for r in grid]
    return grid[scores.index(min(scores))] * mean


def truncated(
    rows: Callable[[], Iterable[Tensor]],
    width: int,
    rank: int,
    seed: object = 0,
    oversampling: int = 10,
    power: int = 3,
) -> tuple[Tensor, Tensor]:
    """(V [width, rank], s [rank]): leading right singular vectors and values of a tall matrix that ``rows()`` gives in
    shards [n, width], once for each of power + 2 passes (Halko, Martinsson & Tropp 2011, on the side that fits)."""
    rank = min(rank, width)
    size = min(rank + oversampling, width)
    basis = torch.linalg.qr(torch.randn(width, size, generator=torch_stream("svd", seed), dtype=torch.float64))[0]
    for _ in range(power + 1):
        product = torch.zeros(width, size, dtype=torch.float64)
        for shard in rows():
            x = shard.double().cpu()
            product += x.T @ (x @ basis)
        basis = torch.linalg.qr(product)[0]
    small = torch.zeros(size, size, dtype=torch.float64)
    for shard in rows():
        y = shard.double().cpu() @ basis
        small += y.T @ y
    values, vectors = torch.linalg.eigh(small)
    s = values.flip(0).clamp_min(0).sqrt()
    return (basis @ vectors.flip(1))[:, :rank].float(), s[:rank].float()


MOST = 2048
"""Positions of a layer (tokens, places of a picture) that each batch gives to the moments of what goes in and out."""


def leading(moments: Tensor, size: int) -> Tensor:
    """The leading eigenvectors [width, size] of a matrix of second moments, columns by falling eigenvalue."""
    width = len(moments)
    if width <= 4 * size:
        turned: Tensor = torch.linalg.eigh(moments.double())[1].flip(1)[:, :size].float()
        return turned
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(width)
        vectors: Tensor = torch.svd_lowrank(moments.float(), q=size + 8, niter=4)[0][:, :size]
        return vectors


def factor_bases(
    bank: GradientBank, examples: Sequence[Any], batch: int, size: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """(Q_S [out, size], Q_A [in, size]) of each layer that has factors, columns by falling eigenvalue, over examples
    with their own targets."""
    s_sum: dict[str, Any] = {}
    a_sum: dict[str, Any] = {}
    with progress("projection", total=len(examples), unit="examples") as advance:
        for at in range(0, len(examples), batch):
            for layer, a, g in bank.factors(examples[at : at + batch], most=MOST):
                a, g = a.flatten(0, 1), g.flatten(0, 1)
                a_new, s_new = (a.T @ a).cpu(), (g.T @ g).cpu()
                if bool(torch.isfinite(a_new).all()) and bool(torch.isfinite(s_new).all()):
                    a_sum[layer.name] = a_sum.get(layer.name, 0) + a_new
                    s_sum[layer.name] = s_sum.get(layer.name, 0) + s_new
            advance(len(examples[at : at + batch]))
    return {name: (leading(s, size), leading(a_sum[name], size)) for name, s in s_sum.items()}


def table_bases(
    bank: GradientBank, examples: Sequence[Any], batch: int, size: int, rows: int, seed: int
) -> dict[str, tuple[Tensor, Tensor] | None]:
    """(P_out [out, rows], Q [in, size]) of embedding tables; None, all as it is, of one that has no more than ``rows``.
    P_out: rows divided by their root mean square (damped as the rest of the curvature) and added up at random, with
    random signs. Q: the leading eigenvectors of what comes back along rows."""
    mass_sum: dict[str, Any] = {}
    s_sum: dict[str, Any] = {}
    for at in range(0, len(examples), batch):
        for layer, mass, s in bank.tables(examples[at : at + batch]):
            if bool(torch.isfinite(mass).all()) and bool(torch.isfinite(s).all()):
                mass_sum[layer.name] = mass_sum.get(layer.name, 0) + mass.cpu()
                s_sum[layer.name] = s_sum.get(layer.name, 0) + s.cpu()
    found: dict[str, tuple[Tensor, Tensor] | None] = {}
    for name, mass in mass_sum.items():
        out = len(mass)
        if out <= rows:
            found[name] = None
            continue
        scale = (mass + 0.1 * mass.mean()).rsqrt() * mass.mean().sqrt()
        g = torch_stream("table", seed, name)
        side = torch.zeros(out, rows)
        signs = torch.randint(0, 2, (out,), generator=g).float() * 2 - 1
        side[torch.arange(out), torch.randint(0, rows, (out,), generator=g)] = signs * scale
        found[name] = side, leading(s_sum[name], size)
    return found


def eigenbases(
    bank: GradientBank, examples: Sequence[Any], batch: int, size: int, seed: int
) -> tuple[int, dict[str, tuple[Tensor, Tensor] | None]]:
    """(numbers per side, what :class:`~whence.engine.project.Eigenbasis` takes of each layer); ``size`` 0: the largest
    that is affordable."""
    rows = size
    if not size:
        tables = [(x.out, x.inp) for x in bank.layers if x.kind == "embedding"]
        size, rows = largest([(x.out, x.inp) for x in bank.layers if x.kind != "embedding"], tables)
    return size, {
        **factor_bases(bank, examples, batch, size), **table_bases(bank, examples, batch, size, rows, seed)
    }  # fmt: skip


class KroneckerFisher:
    """Eigenvalue-corrected Kronecker-factored curvature of a bank's layers, fitted on examples.

    ``bank`` must not project. Layers that are no sum of outer products (norms, embeddings) get the diagonal of their
    own Fisher. ``sampled``: targets drawn from the model (the Fisher); False: the examples' own (the empirical one).
    """

    def __init__(self, bank: GradientBank, sampled: bool = True) -> None:
        if bank.projection is not None:
            raise RunError("EK-FAC on projected gradients", "it needs them whole", "a bank without a projection")
        self.bank, self.sampled = bank, sampled
        self.bases: dict[str, tuple[Tensor, Tensor]] = {}
        self.values: dict[str, Tensor] = {}
        self.damping: dict[str, float] = {}

    def _losses(self, number: int) -> Any:
        objective = self.bank.objective
        return (lambda examples: objective.sampled(examples, number)) if self.sampled else objective.losses

    def fit(self, batches: Callable[[], Iterator[list[Any]]], total: int) -> KroneckerFisher:
        """Two passes over the batches of examples: the factors, then the eigenvalues."""
        a_sum: dict[str, Tensor] = {}
        s_sum: dict[str, Tensor] = {}
        count: dict[str, int] = {}
        seen = 0
        with progress("curvature", total=2 * total, unit="examples") as advance:
            for number, whole in enumerate(batches()):
                batch = self._sound(whole)
                if not batch:
                    continue
                for layer, a, g in self.bank.factors(batch, self._losses(number), MOST):
                    a, g = a.flatten(0, 1), g.flatten(0, 1)
                    a_sum[layer.name] = a_sum.get(layer.name, 0) + a.T @ a
                    s_sum[layer.name] = s_sum.get(layer.name, 0) + g.T @ g
                    count[layer.name] = count.get(layer.name, 0) + len(a)
                seen += len(batch)
                advance(len(whole))
            if not seen:
                raise RunError("curvature", "no example has a finite loss", "examples and weights without NaN")
            for name, a in a_sum.items():
                # The scale of each factor is of no matter: Lambda puts it right.
                self.bases[name] = (
                    torch.linalg.eigh(s_sum[name].double() / seen)[1].float(),
                    torch.linalg.eigh(a.double() / count[name])[1].float(),
                )
            for number, whole in enumerate(batches()):
                batch = self._sound(whole)
                if not batch:
                    continue
                for name, g in self.bank.gradients(batch, self._losses(number)).items():
                    square = (self.into(name, g) ** 2).sum(0)
                    self.values[name] = self.values.get(name, 0) + square / seen
                advance(len(batch))
        self.settle()
        return self

    def _sound(self, batch: list[Any]) -> list[Any]:
        """The examples of a batch whose loss is finite."""
        with torch.no_grad():
            found = self.bank.objective.losses(batch)
        wrong = ~torch.isfinite(found.values)
        if not bool(wrong.any()):
            return batch
        rows = wrong.nonzero()[:, 0]
        out = set((rows if found.owner is None else found.owner[rows]).tolist())
        return [example for i, example in enumerate(batch) if i not in out]

    def settle(self) -> None:
        """The customary damping (Grosse et al. 2023): a tenth of the mean eigenvalue of each layer."""
        self.damping = {name: 0.1 * float(v.mean()) for name, v in self.values.items()}

    def into(self, name: str, g: Tensor) -> Tensor:
        """A layer's gradients [..., out, in] in its eigenbasis."""
        if name not in self.bases:
            return g
        q_s, q_a = (q.to(g) for q in self.bases[name])
        return q_s.T @ g @ q_a

    def back(self, name: str, g: Tensor) -> Tensor:
        """And out of it."""
        if name not in self.bases:
            return g
        q_s, q_a = (q.to(g) for q in self.bases[name])
        return q_s @ g @ q_a.T

    def inverse(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(F + lambda I)^-1 g, layer by layer."""
        return {
            name: self.back(name, self.into(name, g) / (self.values[name].to(g) + max(self.damping[name], 1e-30)))
            for name, g in gradients.items()
        }
