"""An index of a training set: built once, asked as often as one likes.

    index = build(objective, examples, "out/ix")            # one pass over the examples; goes on where it was stopped
    with opened("out/ix", objective, examples) as index:
        found = index.search([query], k=20)                  # both ends of the ranking, with measured recall

``form`` says what is kept of an example's gradient: "sketch:n" (of EK-FAC's coordinates, mixed: n sign bits to scan
all of it, and n int8 numbers to score the best of it again), "auto" (such a sketch, of 2,048 bytes or, where examples
are few, of 9,220), "signs:n" (its signs alone), "bits:n" (EOGP: one sign bit for each leading coordinate), "int8"
(LoGRA), "lorif:c" (LoRIF of rank c).
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..engine import ranks
from ..engine.curvature import KroneckerFisher
from ..engine.gradients import GradientBank
from ..engine.influence import (
    BATCH,
    Fitted,
    Memory,
    Scheme,
    Skipped,
    bank_of,
    batches,
    exact_scores,
    finite,
    gradients_of,
    learn,
    projection_of,
    sound,
    spread,
)  # fmt: skip
from ..engine.influence import build as run
from ..engine.progress import progress
from ..engine.project import Projection
from ..engine.stages import Both, Found, once_more, search
from ..errors import OutputError, RunError
from ..influence.eogp import EOGP
from ..influence.logra import LoGRA
from ..influence.lorif import LoRIF
from ..influence.sketch import Sketch, Staged
from .contents import FILE, Manifest
from .index import Index
from .places import place_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..engine.crew import Workers
    from ..objective import Examples, Objective

FORMS = "auto, sketch:N, signs:N, bits:N (N: 8 or more), int8, lorif:C"
SECONDS, MOST_EXACT = 10.0, 256
"""What the last stage may take unless it is said how many it is of, and how many of each end at most."""
JUDGED, ASKED = 64, 8
"""Examples that forms are held against EK-FAC on, and how many of them are the queries."""
FEW = 16_384
"""Examples of which "auto" keeps 9,220 bytes each, 150 MB in all."""
PART = 16
"""Numbers per side that forms of a smaller projection are judged with, beside a sketch."""
FACTORED = 256
"""Examples that EK-FAC is taken over, for a model of at most:"""
JUDGED_WEIGHTS = 1_500_000
"""Weights that whole gradients are taken of for that: of a larger model, evenly spaced layers."""
SHARD = 1024
"""Rows of a shard at most. Small shards: what a kill can cost is the shard that was being filled."""


@dataclass(frozen=True)
class Form:
    """What is kept, by method. ``size``: numbers per side of the projection, 0: as many as a sketch may take;
    ``bits`` of an example, and int8 ``numbers`` of a sketch (auto, 0: see :meth:`settled`); ``rank`` of LoRIF's
    factors."""

    name: str = "auto"
    size: int = 0
    bits: int = 0
    numbers: int = 0
    rank: int = 0
    seed: int = 0

    @classmethod
    def of(cls, text: str, size: int | None = None, seed: int = 0) -> Form:
        """From "auto", "sketch:512", "bits", "bits:2048", "int8" or "lorif:4". Raises RunError."""
        match = re.fullmatch(r"(auto|sketch|signs|bits|int8|lorif)(?::(\d+))?", text.strip())
        number = int(match[2]) if match and match[2] else 0
        least = 1 if match and match[1] == "lorif" else 8
        if not match or (match[2] and (number < least or match[1] in ("auto", "int8"))):
            raise RunError(f"the format {text!r}", "no such form of an index", FORMS)
        name = match[1]
        if name == "auto":
            return cls(seed=seed, size=size or 0)
        if name in ("sketch", "signs"):
            n = number or 2048
            return cls(name, size or 0, n, n if name == "sketch" else 0, 0, seed)
        rank = (number or 1) if name == "lorif" else 0
        return cls(name, size or (32 if rank else 16), number or 1024, 0, rank, seed)

    def settled(self, examples: int) -> Form:
        """The form in which so many examples are kept: of up to FEW more is kept, as it costs next to nothing."""
        if self.name != "auto" or self.bits:
            return self
        bits, numbers = (8192, 8192) if examples <= FEW else (2016, 1792)
        return replace(self, bits=bits, numbers=numbers)

    @property
    def init(self) -> str:
        """How gradients are projected, for :func:`~whence.engine.influence.projection_of`."""
        return {"lorif": "random", "bits": "pca", "int8": "pca"}.get(self.name, "eigen")

    def scheme(self, shapes: Mapping[str, tuple[int, int]]) -> Scheme:
        """What is kept and scored of gradients of these shapes."""
        if self.name == "lorif":
            return LoRIF(rank=self.rank, size=self.size, seed=self.seed).scheme(shapes)
        if self.name == "signs":
            return Sketch(self.bits, seed=self.seed).scheme(shapes)
        if self.name == "bits":
            return EOGP(bits=self.bits, size=self.size, seed=self.seed).scheme(shapes)
        if self.name == "int8":
            return LoGRA(size=self.size, seed=self.seed).scheme(shapes)
        return Staged(shapes, self.bits, self.numbers, self.seed)


class _Shelf:
    """An Index as a shelf: made when its planes are known, that is with the first rows."""

    def __init__(self, place: str, manifest: Manifest, index: Index | None, per_shard: int = SHARD) -> None:
        self.place, self.manifest, self.index, self.per_shard = place, manifest, index, per_shard
        self._kept: dict[str, NDArray[Any]] = {}
        self._next: int | None = None

    @property
    def done(self) -> int:
        """Rows that need not be made: those that wait in memory for their shard to be full are among them."""
        if self._next is not None:
            return self._next
        return 0 if self.index is None else self.index.done

    @property
    def tensors(self) -> Mapping[str, NDArray[Any]]:
        return self._kept if self.index is None else self.index.tensors

    def keep(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        if self.index is not None:
            self.index.keep(tensors)
        else:
            self._kept |= dict(tensors)

    def begin(self, strides: Mapping[str, int]) -> Index:
        if self.index is None:
            made = replace(self.manifest, planes=dict(strides))
            self.index = Index.create(self.place, made, self._kept, rows_per_shard=self.per_shard)
        return self.index

    def append(self, planes: Mapping[str, NDArray[np.uint8]]) -> None:
        first = self.done
        self.begin({name: codes.shape[1] for name, codes in planes.items()}).append(planes)
        self._next = first + len(next(iter(planes.values())))

    def blocks(self, plane: str, rows: int = 16_384) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        assert self.index is not None
        self.index.flush()
        return self.index.blocks(plane, rows=rows, only_alive=False)

    def rows(self, plane: str, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        assert self.index is not None
        return self.index.rows(plane, numbers)

    def __enter__(self) -> _Shelf:
        return self

    def __exit__(self, *how: Any) -> None:
        """However a build ends, what it has is kept and the next one is let in, in this process too."""
        if self.index is not None:
            self.index.__exit__(*how)


@dataclass(frozen=True)
class TrainingIndex:
    """An index with the model and the examples that it is of."""

    index: Index
    fitted: Fitted
    form: Form

    def search(
        self, queries: Sequence[Any], k: int = 20, exact: int | None = 0, workers: Workers | None = None
    ) -> list[Found]:
        """Both ends of the ranking for each query. ``exact``: so many of each end are scored once more by EK-FAC, from
        their gradients anew; None: as many as about SECONDS allow. ``workers`` scan all rows, in place of this process.
        Raises RunError where EK-FAC was not kept."""
        here = int(self.index.alive.sum())
        if not 1 <= k <= here:
            raise RunError(f"the best {k} examples", f"{here} are in the index", "--top of 1 or more, not more")
        alive = None if self.index.alive.all() else self.index.alive
        fitted = self.fitted
        if workers is not None:
            from .ray_workers import far

            assert isinstance(fitted.shelf, _Shelf)
            fitted = far(fitted, self.form, self.index, fitted.shelf.place, workers)
        curvature = self.curvature(exact)
        exact = self.affordable(curvature, len(queries)) if exact is None else exact
        if not exact or curvature is None:
            return search(fitted, queries, k, alive)
        return [
            once_more(f, curvature, self.fitted, q, k)
            for f, q in zip(search(fitted, queries, min(max(exact, k), here), alive), queries, strict=True)
        ]

    def curvature(self, exact: int | None) -> KroneckerFisher | None:
        """EK-FAC for the last stage: None where it is not wanted (0), or was not kept and need not be (None).
        Raises RunError where it was not kept and so many are to be scored by it."""
        found = None if exact == 0 else _restored(self.index, self.fitted.bank)
        if found is None and exact:
            why = "EK-FAC was not kept: the model is too large, or the index was built with judge=False"
            raise RunError(f"the best {exact} scored by EK-FAC", why, "--exact 0")
        return found

    def affordable(self, curvature: KroneckerFisher | None, queries: int) -> int:
        """How many of each end it can score for each query in about SECONDS in all."""
        if curvature is None:
            return 0
        began = time.monotonic()
        curvature.bank.gradients([self.fitted.examples[0]] * 4)
        each = (time.monotonic() - began) / 4
        return min(int(SECONDS / max(each, 1e-4) / 2 / queries), MOST_EXACT)

    def bytes_per_example(self) -> dict[str, int]:
        """plane -> bytes."""
        return dict(self.index.manifest.planes)

    def __enter__(self) -> TrainingIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.index.close()


def build(
    objective: Objective, examples: Examples, place: str | Path, form: Form | str = "auto",
    layers: tuple[str, ...] | None = None, resume: bool = False, about: Mapping[str, Any] | None = None,
    batch: int = BATCH, judge: bool = True, workers: Workers | None = None, per_shard: int | None = None,
) -> TrainingIndex:  # fmt: skip
    """Take the examples' gradients into an index at ``place``. ``resume``: go on with one that was stopped.

    ``about``: what the manifest should say of where model and data come from; ``judge``: measure on a sample how well
    this form, and the others, agree with EK-FAC (three more passes over the sample); ``workers`` make the rows, in
    place of this process; ``per_shard``: rows of a shard, and of what a worker is given, else chosen by their number.
    Where ``torch.distributed`` has joined several processes all of them have to call this, and share the rows.
    Raises RunError, OutputError.
    """
    from . import ranks as by_ranks
    from . import ray_workers

    if not len(examples):
        raise RunError("training examples", "there is none", "one or more")
    form = (Form.of(form) if isinstance(form, str) else form).settled(len(examples))
    if workers is not None:
        workers.check()
    many = ranks.count()
    if many > 1:
        if workers is not None:
            raise RunError("an index on Ray", f"torch.distributed has joined {many} processes", "one of the two")
        by_ranks.met(str(place))
    index = _resumed(str(place), objective, examples, form, resume)
    manifest = Manifest(
        model=objective.fingerprint(), data=examples.fingerprint(), examples=len(examples), planes={"none": 1},
        method=form.name, code=__version__,
        settings={"form": asdict(form), "layers": list(layers) if layers else None, **dict(about or {})},
    )  # fmt: skip
    hands = (workers.count or 8) if workers else many if many > 1 else None
    per_shard = per_shard or _per_shard(len(examples), batch, hands)
    if many > 1:
        ranks.agree(by_ranks.asked_of(str(place)))  # all have seen what is there before the first of them writes
    if ranks.number():
        following = by_ranks.Follower(str(place), index)
        with by_ranks.in_step(by_ranks.asked_of(str(place))):
            scheme, bank = _learned(following, objective, examples, form, layers, judge)
            learn(scheme, bank, examples, following, batch)
        by_ranks.fill(following, scheme, bank, examples, batch)
        left_out = by_ranks.followed(following, scheme)
        assert following.index is not None
        return TrainingIndex(following.index, _fitted(form, scheme, bank, examples, following, left_out), form)
    with _Shelf(str(place), manifest, index, per_shard) as shelf:
        if index is not None:
            ray_workers.gather(index, str(place))
        with by_ranks.in_step(by_ranks.asked_of(str(place))) if many > 1 else nullcontext():
            scheme, bank = _learned(shelf, objective, examples, form, layers, judge)
            if workers is not None or many > 1:
                learn(scheme, bank, examples, shelf, batch)
        if workers is not None:
            ray_workers.fill(shelf.begin(scheme.planes), str(place), bank, workers, batch)
        elif many > 1:
            by_ranks.fill(shelf, scheme, bank, examples, batch)
        elif shelf.index is not None:
            learn(scheme, bank, examples, shelf, batch)
            _close_gaps(scheme, bank, examples, shelf.index, str(place), batch)
        # What is left to do: rows, if there are, and what needs all of them.
        skipped = run(scheme, bank, examples, shelf, batch, "index")
        assert shelf.index is not None
        if workers is not None or many > 1 or resume:
            ray_workers.forget(str(place))
        if many > 1:
            shelf.index.flush()
            ranks.agree(f"finish the index {place}")
    return TrainingIndex(shelf.index, _fitted(form, scheme, bank, examples, shelf, tuple(skipped.numbers)), form)


def _learned(
    shelf: Any, objective: Objective, examples: Examples, form: Form, layers: tuple[str, ...] | None, judge: bool
) -> tuple[Scheme, GradientBank]:
    """What is learned of a sample before any row is made, or was and is on the shelf."""
    projection = projection_of(form.init, form.size, form.seed, objective, examples, layers, shelf)
    bank = bank_of(objective, examples, layers, projection)
    scheme = form.scheme(bank.shapes)
    if "stages" in shelf.tensors:
        bank.stage_scale = _tensor(shelf.tensors["stages"])
    elif bank.stage_scale is not None:
        shelf.keep({"stages": bank.stage_scale.numpy()})
    if judge and "trust/names" not in shelf.tensors:
        exact = _exact(bank, examples)
        shelf.keep(_as_tensors(judged(bank, examples, form, exact)) | _of_exact(exact, bank))
    return scheme, bank


def opened(place: str | Path, objective: Objective, examples: Examples) -> TrainingIndex:
    """An index that was built, for this model and these examples. Raises RunError where it is of others, damaged or
    not finished."""
    index = Index.open(place, model=objective.fingerprint(), data=examples.fingerprint())
    if index.done < index.manifest.examples:
        found = f"it holds {index.done} of {index.manifest.examples} examples"
        raise RunError(f"ask the index {place}", found, "whence index ... --resume, which goes on with it")
    form, scheme, bank, shelf = restored(index, str(place), objective, examples)
    last = scheme.large if isinstance(scheme, Both) else scheme
    if "skipped" not in shelf.tensors or not last.tensors():
        found = "its rows are all there, what is learned of them is not"
        raise RunError(f"ask the index {place}", found, "whence index ... --resume, which goes on with it")
    skipped = tuple(int(i) for i in shelf.tensors["skipped"])
    return TrainingIndex(index, _fitted(form, scheme, bank, examples, shelf, skipped), form)


def restored(
    index: Index, place: str, objective: Objective, examples: Examples, layers: tuple[str, ...] | None = None
) -> tuple[Form, Scheme, GradientBank, _Shelf]:
    """What an index was fitted with, from its tensors. ``layers``: those that were tracked in the end, if known."""
    settings = index.manifest.settings
    form = Form(**settings["form"])
    layers = layers or (tuple(settings["layers"]) if settings["layers"] else None)
    shelf = _Shelf(place, index.manifest, index)
    projection = projection_of(form.init, form.size, form.seed, objective, examples, layers, shelf)
    bank = GradientBank(objective, layers, projection)
    bank.check(next(iter(sound(objective, spread(examples, 64))), examples[0]), drop=True)
    if "stages" in shelf.tensors:
        bank.stage_scale = _tensor(shelf.tensors["stages"])
    scheme = form.scheme(bank.shapes)
    scheme.restore({k.removeprefix("learned/"): shelf.tensors[k] for k in shelf.tensors if k.startswith("learned/")})
    return form, scheme, bank, shelf


def rows_of(
    scheme: Scheme, bank: GradientBank, examples: Examples, first: int, stop: int, batch: int = BATCH
) -> tuple[dict[str, NDArray[np.uint8]], list[int]]:
    """The rows of a range of examples, plane by plane, and which of them have no finite gradient."""
    skipped, parts = Skipped(), []
    for n, part in enumerate(batches(examples, first, stop, batch)):
        parts.append(scheme.encode(finite(bank.gradients(part), first + n * batch, skipped)))
    return {plane: np.concatenate([p[plane] for p in parts]) for plane in parts[0]}, skipped.numbers


def _per_shard(n: int, batch: int, hands: int | None) -> int:
    """Whole batches, so that ranges are cut where one process cuts them; where ``hands`` share them, small enough that
    each gets several."""
    most = min(SHARD, -(-n // (8 * hands))) if hands else SHARD
    return batch * max(1, most // batch)


def _close_gaps(scheme: Scheme, bank: GradientBank, examples: Examples, index: Index, place: str, batch: int) -> None:
    """Ranges that workers left out, before rows that others made."""
    from .ray_workers import gather, note

    gaps = [(a, min(b, len(index))) for a, b in index.missing() if a < len(index)]
    if not gaps:
        return
    with progress("gaps", total=len(gaps), unit="ranges") as advance:
        for first, stop in gaps:
            planes, skipped = rows_of(scheme, bank, examples, first, stop, batch)
            if skipped:
                note(place, index.manifest, first, stop, skipped)
            index.put(first, planes)
            gather(index, place)
            advance()


def _fitted(
    form: Form, scheme: Scheme, bank: GradientBank, examples: Examples, shelf: Any, skipped: tuple[int, ...]
) -> Fitted:
    notes = []
    if bank.coverage < 1:
        notes.append(f"{bank.coverage:.0%} of the trained weights are covered; not: {', '.join(bank.uncovered)}")
    if skipped:
        named = ", ".join(examples.label(i) for i in skipped[:5])
        notes.append(f"{len(skipped)} examples have gradients that are not finite and score 0: {named}")
    return Fitted(form.name, asdict(form), scheme, bank, examples, shelf, 0.0, skipped, tuple(notes))


def _resumed(place: str, objective: Objective, examples: Examples, form: Form, resume: bool) -> Index | None:
    """The index that is there, to go on with; None where there is none."""
    if place_of(place).read(FILE) is None:
        return None
    index = Index.open(place, model=objective.fingerprint(), data=examples.fingerprint())
    if not resume:
        raise OutputError(f"build the index {place}", "there is one already", "--resume, or another place")
    found = Form(**index.manifest.settings["form"])
    if found != form:
        raise RunError(f"go on with the index {place} as {form}", f"it was begun as {found}", "the same --format")
    return index


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(array))


# -- how far to trust it ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """One form on a sample: bytes per example, and NDCG@20 and Spearman of its scores with EK-FAC's."""

    form: str
    bytes: int
    ndcg: float
    spearman: float


def judged(bank: GradientBank, examples: Examples, form: Form, curvature: KroneckerFisher) -> list[Judged]:
    """This form and others of its projection on :data:`JUDGED` examples (of a large model by some of its layers), as
    ``ASKED`` of them ask for the rest: the curve of quality against bytes. The measure is EK-FAC on the same sample,
    which follows retraining better than any (NDCG@20 .95 with LDS over 28 settings in the paper on EOGP). A form learns
    what it learns from up to four times as many: of those alone that it is judged on it would know too much."""
    from scipy.stats import spearmanr
    from sklearn.metrics import ndcg_score

    whole = curvature.bank
    names = {layer.name for layer in whole.layers}
    most = FACTORED if len(names) == len(bank.layers) else JUDGED
    taught = spread(examples, min(max(JUDGED, len(examples) // 4), most))
    at = np.unique(np.linspace(0, len(taught) - 1, min(JUDGED, len(taught))).astype(int))
    chosen = [taught[i] for i in at]
    if len(chosen) < 3 * ASKED:
        return []
    queries = chosen[:: max(len(chosen) // ASKED, 1)][:ASKED]
    true = exact_scores(curvature, queries, chosen)
    own = [next(i for i, c in enumerate(chosen) if c is q) for q in queries]
    tried: dict[str, Form] = {}
    if form.init == "eigen":
        tried |= {f"signs:{n}": replace(form, name="signs", bits=n) for n in (2048, 8192)}
        others = [n for n in (512, 2048, 8192) if n != form.numbers]
        tried |= {f"sketch:{n}": replace(form, name="sketch", bits=n, numbers=n) for n in others}
    if form.init != "random":
        part = form.size if form.init == "pca" else PART
        own_size = {n: replace(form, name="bits", bits=n, size=part) for n in (256, 1024, 4096)}
        tried |= {f"bits:{n}": one for n, one in own_size.items()}
        tried["int8"] = replace(form, name="int8", size=part)
    many = form.numbers if form.name == "sketch" else form.bits
    tried[f"{form.name}:{many}" if form.name in ("bits", "sketch", "signs") else form.name] = form
    gradients = {name: g for name, g in gradients_of(bank, taught)[0].items() if name in names}
    of_queries = {name: g for name, g in gradients_of(bank, queries)[0].items() if name in names}
    found = []
    for name, one in tried.items():
        k = one.size if one.init == "pca" else None
        given, asked = (_leading(bank, some, k) for some in (gradients, of_queries))
        shelf, scheme = Memory(), one.scheme({n: (g.shape[1], g.shape[2]) for n, g in given.items()})
        scheme.learn(given)
        shelf.append(scheme.encode(given))
        scheme.finish(shelf)
        codes = {plane: shelf.rows(plane, at) for plane in scheme.planes}
        scores = scheme.score(scheme.prepare(asked), codes)
        values = []
        for q, me in enumerate(own):
            others = np.arange(len(chosen)) != me  # a query's own example is found by any form
            gain = np.clip(true[q][others], 0, None)
            rank = float(np.nan_to_num(spearmanr(true[q][others], scores[q][others]).statistic))
            values.append((ndcg_score([gain], [scores[q][others]], k=20) if gain.any() else 0.0, rank))
        ndcg, rho = np.mean(values, 0)
        found.append(Judged(name, sum(scheme.planes.values()), float(ndcg), float(rho)))
    return found


def _leading(bank: GradientBank, gradients: Mapping[str, Tensor], k: int | None) -> dict[str, Tensor]:
    """What forms of ``k`` numbers per side would have of their own: of layers in their eigenbasis the leading part, of
    others, whose order says nothing, a random projection. None: all."""
    if k is None:
        return dict(gradients)
    found, sorted_ones = {}, set(bank.factored)
    for name, g in gradients.items():
        if name not in sorted_ones:
            for axis, which in ((1, "out"), (2, "in")):
                side = Projection(k).side(name, which, g.shape[axis], min(g.shape[axis], k))
                g = g if side is None else torch.tensordot(g, side.to(g), ([axis], [0])).movedim(-1, axis)
        found[name] = g[:, :k, :k]
    return found


def _exact(bank: GradientBank, examples: Examples) -> KroneckerFisher:
    """EK-FAC of the bank's layers (of a large model: of some) over a sample, for judging and for the last stage."""
    names = _some_layers(bank)
    whole = GradientBank(bank.objective, names)
    whole.check(examples[0], drop=True)
    whole.stage_scale = bank.stage_scale
    sample = spread(examples, JUDGED if len(names) < len(bank.layers) else FACTORED)
    lists = [sample[i : i + BATCH] for i in range(0, len(sample), BATCH)]
    return KroneckerFisher(whole).fit(lambda: iter(lists), len(sample))


def _of_exact(curvature: KroneckerFisher, bank: GradientBank) -> dict[str, NDArray[Any]]:
    """What the last stage needs, where EK-FAC is of all layers; nothing for a model too large for that."""
    if len(curvature.bank.layers) < len(bank.layers):
        return {}
    found: dict[str, NDArray[Any]] = {}
    for name, values in curvature.values.items():
        found[f"exact/values/{name}"] = values.numpy()
        for side, basis in zip(("out", "in"), curvature.bases.get(name, ()), strict=False):
            found[f"exact/{side}/{name}"] = basis.numpy()
    return found


def _restored(index: Index, bank: GradientBank) -> KroneckerFisher | None:
    """EK-FAC as it was kept; None where it was not."""
    names = [layer.name for layer in bank.layers]
    held = set(index.tensors)
    if not all(f"exact/values/{n}" in held for n in names):
        return None
    whole = GradientBank(bank.objective, names)
    whole.stage_scale = bank.stage_scale
    found = KroneckerFisher(whole)
    for n in names:
        found.values[n] = _tensor(index.tensors[f"exact/values/{n}"])
        if f"exact/out/{n}" in held:
            found.bases[n] = _tensor(index.tensors[f"exact/out/{n}"]), _tensor(index.tensors[f"exact/in/{n}"])
    found.settle()
    return found


def _some_layers(bank: GradientBank) -> tuple[str, ...]:
    """All layers, or every n-th, n so that they have at most JUDGED_WEIGHTS weights."""
    for step in range(1, len(bank.layers) + 1):
        chosen = bank.layers[step // 2 :: step]
        if sum(x.parameters for x in chosen) <= JUDGED_WEIGHTS:
            return tuple(x.name for x in chosen)
    return (min(bank.layers, key=lambda x: x.parameters).name,)


def _as_tensors(found: list[Judged]) -> dict[str, NDArray[Any]]:
    names = "\n".join(j.form for j in found).encode()
    return {
        "trust/names": np.frombuffer(names or b"\n", np.uint8),
        "trust/values": np.array([[j.bytes, j.ndcg, j.spearman] for j in found], np.float64).reshape(-1, 3),
    }


def judgement(index: Index) -> list[Judged]:
    """What was measured when the index was built."""
    if "trust/names" not in index.tensors:
        return []
    names = bytes(index.tensors["trust/names"]).decode().strip().split("\n")
    values = index.tensors["trust/values"]
    return [Judged(n, int(b), float(d), float(r)) for n, (b, d, r) in zip(names, values, strict=False)]
