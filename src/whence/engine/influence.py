"""What the methods of the room `influence` have in common: one pass over the examples, codes on a shelf, a query.

A method gives a :class:`Scheme`: what it keeps of an example's gradient, and how a query's gradient is held against
it. Influences are of the loss: the score of example i for query q is g_q' C^-1 g_i, positive where training on i made
the query's output more likely.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import RunError
from ..explanation import Cost, Explanation
from ..objective import Examples, Objective
from ..units import Units
from .gradients import GradientBank
from .progress import progress
from .project import Eigenbasis, EigenProjection, Projection

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .curvature import KroneckerFisher
    from .progress import Advance

    Codes = NDArray[np.uint8]

KIND = "training example"
BATCH = 16
SAMPLE = 64
"""Examples that a projection's eigenvectors are learned from."""
BLOCK = 16_384
"""Rows of a shelf that are scored at once."""


class Shelf(Protocol):
    """A place for rows of fixed length, one for each example, in named planes."""

    @property
    def done(self) -> int:
        """Examples that are kept: where a stopped pass goes on."""
        ...

    @property
    def tensors(self) -> Mapping[str, NDArray[Any]]: ...

    def append(self, planes: Mapping[str, Codes]) -> None: ...

    def keep(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Keep what was learned over all examples beside the rows."""
        ...

    def blocks(self, plane: str, rows: int = BLOCK) -> Iterator[tuple[int, Codes]]:
        """(number of the first row, codes [row, stride])."""
        ...

    def rows(self, plane: str, numbers: NDArray[np.int64]) -> Codes: ...


class Memory:
    """A shelf in memory."""

    def __init__(self) -> None:
        self._planes: dict[str, list[Codes]] = {}
        self._whole: dict[str, Codes] = {}
        self.tensors: dict[str, NDArray[Any]] = {}
        self.done = 0

    def append(self, planes: Mapping[str, Codes]) -> None:
        for name, codes in planes.items():
            self._planes.setdefault(name, []).append(codes)
        self.done += len(next(iter(planes.values())))

    def keep(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        self.tensors |= dict(tensors)

    def _plane(self, name: str) -> Codes:
        parts = self._planes.get(name, [])
        if len(parts) > 1:
            self._planes[name] = [np.concatenate(parts)]
        return self._planes[name][0]

    def blocks(self, plane: str, rows: int = BLOCK) -> Iterator[tuple[int, Codes]]:
        codes = self._plane(plane)
        for start in range(0, len(codes), rows):
            yield start, codes[start : start + rows]

    def rows(self, plane: str, numbers: NDArray[np.int64]) -> Codes:
        return np.asarray(self._plane(plane)[numbers])


class Scheme(Protocol):
    """What a method keeps of gradients and how it scores them. Stateless but for what ``learn`` and ``finish`` set;
    ``tensors`` and ``restore`` carry that to another process."""

    sample: int
    """Examples whose gradients ``learn`` wants to see before the pass; 0: none."""

    @property
    def planes(self) -> dict[str, int]:
        """Plane -> bytes per example; known once it has learned."""

    def learn(self, gradients: Mapping[str, Tensor]) -> None:
        """See a sample's gradients, layer -> [example, out, in]."""

    def encode(self, gradients: Mapping[str, Tensor]) -> dict[str, Codes]:
        """The rows that are kept of these examples, plane -> [example, stride]."""

    def finish(self, shelf: Shelf) -> None:
        """Learn what needs all examples, from what was kept."""

    def tensors(self) -> dict[str, NDArray[Any]]:
        """All that was learned."""

    def restore(self, tensors: Mapping[str, NDArray[Any]]) -> None: ...

    def prepare(self, gradients: Mapping[str, Tensor]) -> Any:
        """A query's side of the score, for gradients [query, out, in] of each layer."""

    def score(self, prepared: Any, codes: Mapping[str, Codes]) -> NDArray[np.float32]:
        """score[query, row] of rows of all planes."""


def batches(examples: Examples, start: int = 0, stop: int | None = None, batch: int = BATCH) -> Iterator[list[Any]]:
    """The examples in their order, in lists of at most ``batch``."""
    stop = len(examples) if stop is None else stop
    for at in range(start, stop, batch):
        yield [examples[i] for i in range(at, min(at + batch, stop))]


@dataclass
class Skipped:
    """Examples whose gradients were not finite: number -> label. Their rows are nothing, and they are named."""

    numbers: list[int] = field(default_factory=list)


def finite(gradients: Mapping[str, Tensor], first: int, skipped: Skipped) -> dict[str, Tensor]:
    """The gradients with those of examples that are not finite set to nothing, and these noted."""
    n = len(next(iter(gradients.values())))
    good = torch.ones(n, dtype=torch.bool)
    for g in gradients.values():
        good &= torch.isfinite(g.flatten(1)).all(1).cpu()
    if bool(good.all()):
        return dict(gradients)
    skipped.numbers += [first + int(i) for i in (~good).nonzero()[:, 0]]
    return {
        name: torch.where(good.to(g.device)[:, None, None], g, torch.zeros_like(g)) for name, g in gradients.items()
    }


def sound(objective: Objective, examples: Sequence[Any]) -> Iterator[Any]:
    """The examples whose loss is finite."""
    for example in examples:
        with torch.no_grad():
            if bool(torch.isfinite(objective.losses([example]).values).all()):
                yield example


def spread(examples: Examples, n: int) -> list[Any]:
    """``n`` examples at equal distances over all of them."""
    if n >= len(examples):
        return [examples[i] for i in range(len(examples))]
    return [examples[int(i)] for i in np.linspace(0, len(examples) - 1, n).round()]


def gradients_of(
    bank: GradientBank, chosen: Sequence[Any], batch: int = BATCH, advance: Callable[[int], object] | None = None
) -> tuple[dict[str, Tensor], list[int]]:
    """The gradients of a list of examples, on the processor, and the places of those that are not finite."""
    parts: dict[str, list[Tensor]] = {}
    lost = Skipped()
    for at in range(0, len(chosen), batch):
        for name, g in finite(bank.gradients(list(chosen[at : at + batch])), at, lost).items():
            parts.setdefault(name, []).append(g.cpu())
        if advance is not None:
            advance(len(chosen[at : at + batch]))
    return {name: torch.cat(gs) for name, gs in parts.items()}, lost.numbers


def _refuse(lost: Sequence[int]) -> None:
    if lost:
        raise RunError(f"the query {lost[0]}", "its gradient is not finite", "a query with a finite loss")


def exact_scores(
    curvature: KroneckerFisher, queries: Sequence[Any], chosen: Examples | Sequence[Any], advance: Advance | None = None
) -> NDArray[np.float32]:
    """score[query, example] by EK-FAC, from gradients taken anew; 0 for an example whose gradient is not finite. Raises
    RunError for such a query."""
    lost = Skipped()
    rows = flat(curvature.inverse(finite(curvature.bank.gradients(list(queries)), 0, lost)))
    _refuse(lost.numbers)
    found = []
    for at in range(0, len(chosen), BATCH):
        part = [chosen[i] for i in range(at, min(at + BATCH, len(chosen)))]
        found.append((rows @ flat(finite(curvature.bank.gradients(part), at, Skipped())).T).numpy())
        if advance is not None:
            advance(len(part))
    return np.concatenate(found, 1)


def learn(
    scheme: Scheme, bank: GradientBank, examples: Examples, shelf: Shelf, batch: int = BATCH
) -> tuple[dict[str, Tensor], list[int]]:
    """What a scheme wants to see before any row is made: seen, or taken from what was kept. Gives what was taken of all
    examples, where the sample was all of them."""
    kept = {k.removeprefix("learned/"): v for k, v in shelf.tensors.items() if k.startswith("learned/")}
    if kept:
        scheme.restore(kept)
    if kept or not scheme.sample:
        return {}, []
    chosen = spread(examples, scheme.sample)
    with progress("a sample", total=len(chosen), unit="examples") as advance:
        sample, lost = gradients_of(bank, chosen, batch, advance)
    scheme.learn(sample)
    shelf.keep({f"learned/{k}": v for k, v in scheme.tensors().items()})
    return (sample, lost) if len(chosen) == len(examples) else ({}, [])


def build(
    scheme: Scheme, bank: GradientBank, examples: Examples, shelf: Shelf, batch: int = BATCH, what: str = "gradients"
) -> Skipped:
    """One pass over the examples (and one over a sample before it, where the scheme wants that), from where the shelf
    stopped. Raises RunError for no example, or none with finite gradients."""
    if not len(examples):
        raise RunError("training examples", "there is none", "one or more")
    skipped = Skipped()
    if "skipped" in shelf.tensors:
        skipped.numbers = shelf.tensors["skipped"].tolist()
    taken, lost = learn(scheme, bank, examples, shelf, batch)  # gradients are not taken twice
    with progress(what, total=len(examples), done=shelf.done, unit="examples") as advance:
        for part in batches(examples, shelf.done, batch=batch):
            known, at = len(skipped.numbers), shelf.done
            if taken:
                gradients = {name: g[at : at + len(part)] for name, g in taken.items()}
                skipped.numbers += [i for i in lost if at <= i < at + len(part)]
            else:
                gradients = finite(bank.gradients(part), at, skipped)
            if len(skipped.numbers) > known:  # a pass that goes on must know what it left out before it was stopped
                shelf.keep({"skipped": np.asarray(skipped.numbers, np.int64)})
            shelf.append(scheme.encode(gradients))
            advance(len(part))
    if len(skipped.numbers) == len(examples):
        raise RunError(
            "gradients of the examples", "none of them is finite", "examples and weights without NaN, a loss in float32"
        )
    scheme.finish(shelf)
    shelf.keep(
        {"skipped": np.asarray(skipped.numbers, np.int64)} | {f"learned/{k}": v for k, v in scheme.tensors().items()}
    )
    return skipped


@dataclass(frozen=True)
class Fitted:
    """A method after its pass over the examples; ``explain`` answers queries."""

    method: str
    settings: dict[str, Any]
    scheme: Scheme
    bank: GradientBank
    examples: Examples
    shelf: Shelf
    seconds: float
    skipped: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    def prepare(self, queries: Sequence[Any], batch: int = BATCH) -> Any:
        """The queries' side of the scores. Raises RunError where a query's gradient is not finite."""
        gradients, lost = gradients_of(self.bank, queries, batch)
        _refuse(lost)
        return self.scheme.prepare(gradients)

    def scores(self, queries: Sequence[Any]) -> NDArray[np.float32]:
        """score[query, example], larger where the example made the query's output more likely."""
        return np.concatenate([part for _, part in self.stream(self.prepare(queries))], 1)

    def stream(self, prepared: Any, rows: int = BLOCK) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(number of the first row, score[query, row]), block by block over all rows."""
        planes = tuple(self.scheme.planes)
        for parts in zip(*(self.shelf.blocks(plane, rows=rows) for plane in planes), strict=True):
            codes = {plane: part for plane, (_, part) in zip(planes, parts, strict=True)}
            yield parts[0][0], self.scheme.score(prepared, codes)

    def at(self, prepared: Any, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """score[query, number] of these examples alone."""
        return self.scheme.score(prepared, {p: self.shelf.rows(p, numbers) for p in self.scheme.planes})

    def explain(self, query: Any) -> Explanation:
        """Scores of all examples for one query."""
        began = time.monotonic()
        scores = self.scores([query])[0]
        return explanation_of(self.method, self.settings, self.examples, scores, time.monotonic() - began, self.notes)


def units_of(examples: Examples, numbers: Sequence[int] | None = None) -> Units:
    """The examples as units; two of one label are told apart."""
    chosen = range(len(examples)) if numbers is None else numbers
    names = tuple(examples.label(int(i)) for i in chosen)
    times: dict[str, int] = {}
    occurrence = []
    for name in names:
        times[name] = times.get(name, 0) + 1
        occurrence.append(times[name])
    return Units(KIND, names, tuple(((int(i),),) for i in chosen), tuple(occurrence))


def explanation_of(
    method: str, settings: dict[str, Any], examples: Examples, scores: NDArray[Any], seconds: float,
    notes: tuple[str, ...] = (),
) -> Explanation:  # fmt: skip
    """An Explanation of all examples."""
    return Explanation(
        method=method, units=units_of(examples), scores=np.asarray(scores, np.float32), axes=(KIND,),
        readout="how much more likely training on the example made the output (a first-order estimate)",
        kind="influence", settings=settings, cost=Cost(1, seconds), notes=notes,
    )  # fmt: skip


def projection_of(
    init: str, size: int, seed: int, objective: Objective, examples: Examples, layers: tuple[str, ...] | None,
    shelf: Shelf,
) -> Projection | EigenProjection | Eigenbasis:  # fmt: skip
    """The projection of a fit. ``init``: "random", or "pca": the leading eigenvectors of what goes into each layer and
    of what comes back, over a sample of :data:`SAMPLE` examples; kept on the shelf, as a query needs it again. "eigen":
    the same for :class:`~whence.engine.project.Eigenbasis`, ``size`` 0 being the largest that MOST coordinates in all
    allow."""
    if init == "random":
        return Projection(size, seed)
    if init not in ("pca", "eigen"):
        raise RunError(f"a projection by {init!r}", "no such projection", "pca, eigen, random")
    from .curvature import eigenbases, factor_bases

    sides = _sides(shelf)
    if not sides:
        bank = GradientBank(objective, layers)
        bank.check(examples[0], drop=True)
        sample = spread(examples, SAMPLE)
        found: Mapping[str, tuple[Tensor, Tensor] | None]
        if init == "pca":
            found = factor_bases(bank, sample, BATCH, size)
        else:
            size, found = eigenbases(bank, sample, BATCH, size, seed)
        learned = {"projected": np.array([size])}
        for name, pair in found.items():
            own = {"out": pair[0], "in": pair[1]} if pair else {"whole": torch.ones(1)}
            learned |= {f"projection/{name}/{k}": x.contiguous().numpy() for k, x in own.items()}
        shelf.keep(learned)  # at once: a build that goes on must not find half of it
        sides = _sides(shelf)
    if init == "pca":
        return EigenProjection(size, seed, {name: (pair["out"], pair["in"]) for name, pair in sides.items()})
    bases = {name: None if "whole" in pair else (pair["out"], pair["in"]) for name, pair in sides.items()}
    return Eigenbasis(int(shelf.tensors["projected"][0]), seed, bases)


def _sides(shelf: Shelf) -> dict[str, dict[str, Tensor]]:
    """layer -> what was kept of its projection."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in shelf.tensors.items():
        if key.startswith("projection/"):
            name, side = key.removeprefix("projection/").rsplit("/", 1)
            found.setdefault(name, {})[side] = torch.from_numpy(np.array(value))
    return found


def bank_of(objective: Objective, examples: Examples, layers: tuple[str, ...] | None, projection: Any) -> GradientBank:
    """The bank of a fit: layers that cannot be trusted left out, timesteps brought to one size where there are any."""
    bank = GradientBank(objective, layers, projection)
    bank.check(next(iter(sound(objective, spread(examples, 64))), examples[0]), drop=True)
    bank.learn_stages(spread(examples, 32))
    return bank


def fit(
    method: Any, name: str, make: Callable[[dict[str, tuple[int, int]]], Scheme], objective: Objective,
    examples: Examples, shelf: Shelf | None,
    size: int | None, init: str = "random", layers: tuple[str, ...] | None = None, seed: int = 0,
) -> Fitted:  # fmt: skip
    """Build a scheme's shelf (in memory, unless one is given) and return what answers queries. ``make``: the scheme
    for gradients of these shapes."""
    began = time.monotonic()
    if not len(examples):
        raise RunError("training examples", "there is none", "one or more")
    shelf = Memory() if shelf is None else shelf
    projection = None if size is None else projection_of(init, size, seed, objective, examples, layers, shelf)
    bank = bank_of(objective, examples, layers, projection)
    scheme = make(bank.shapes)
    skipped = build(scheme, bank, examples, shelf)
    notes = []
    if bank.coverage < 1:
        notes.append(f"{bank.coverage:.0%} of the trained weights are covered; not: {', '.join(bank.uncovered)}")
    if skipped.numbers:
        named = ", ".join(examples.label(i) for i in skipped.numbers[:5])
        notes.append(f"{len(skipped.numbers)} examples have gradients that are not finite and score 0: {named}")
    return Fitted(
        name, asdict(method), scheme, bank, examples, shelf, time.monotonic() - began, tuple(skipped.numbers),
        tuple(notes),
    )  # fmt: skip


def flat(gradients: Mapping[str, Tensor]) -> Tensor:
    """[example, all layers' numbers side by side], float32 on the CPU."""
    return torch.cat([g.detach().flatten(1).float().cpu() for g in gradients.values()], 1)
