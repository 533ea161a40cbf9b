"""How is an index built, or scanned, by many machines? Ray's actors each take ranges of examples, one after the other.

    build(objective, examples, "s3://bucket/ix", workers=Workers("10.0.0.1:6379", load))
    index.search([query], workers=Workers("auto", load))

What is fitted once (projection, bases, dampings) the driver fits as it does alone and keeps among the index's tensors.
A worker makes model and examples anew with ``load``, reads the tensors, and for each range that it is given computes
the rows as one process would and writes them where the index lies. It tells nobody but by what it has written: rows
are listed by the driver when they are seen, and examples without a finite gradient stand in a note that is written
before their rows. So a worker may die at any moment, and so may the driver: what was written stays, what was not is
still ``missing``.

There is no Ray Data in this: a worker has the examples by their numbers, so a range is two numbers.
"""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.crew import each
from ..engine.progress import progress
from ..errors import OutputError, RunError
from .contents import FILE, Manifest
from .index import Index
from .places import place_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..engine.crew import Job, Work, Workers
    from ..engine.gradients import GradientBank
    from ..engine.influence import Fitted
    from ..objective import Examples, Objective
    from .training_index import Form

ARRIVES, GATHERED = 10.0, 15.0
"""Seconds: for what a worker wrote to be seen here; between two looks for what was written."""
SCANNED = 262_144
"""Rows that a worker scores at once, at most."""
NOTE = re.compile(r"skipped-\d{12}-\d{12}\.json")
SHARED = "a folder that all hosts see under one name, or an object store (s3://bucket/ix)"


# -- building --------------------------------------------------------------------------------------------------------


def fill(index: Index, where: str, bank: GradientBank, workers: Workers, batch: int) -> None:
    """Have the rows that are missing made. Raises RunError when a range fails again and again; the rows of the others
    are kept then."""
    ranges = index.missing()
    if not ranges:
        return
    where = shared(where)
    make = partial(_builder, where, workers.load, tuple(layer.name for layer in bank.layers), batch)
    asked = f"build the index {where} on Ray at {workers.address}"
    read: dict[str, list[int]] = {}
    hosts: set[str] = set()
    last = time.monotonic()
    try:
        with (
            closing(each(workers, make, ranges, asked, "--resume, which goes on with the rest")) as results,
            progress("index on Ray", total=len(ranges), unit="ranges") as advance,
        ):
            for job, _, worker in results:
                host = worker.split(",")[0]
                if host not in hosts:  # at once, not after hours of work that nobody can see
                    hosts.add(host)
                    seen(index, where, read, job, worker)
                elif time.monotonic() - last > GATHERED:
                    gather(index, where, read)
                    last = time.monotonic()
                advance(note=worker)
    finally:
        gather(index, where, read)
    for job in index.missing():
        seen(index, where, read, job, "one of the workers")


def _builder(where: str, load: Callable[[], tuple[Objective, Examples]], layers: tuple[str, ...], batch: int) -> Work:
    """In a worker: load everything; gives what makes the rows of a range."""
    from .training_index import restored, rows_of

    if place_of(where).read(FILE) is None:
        raise RunError(f"reach the index {where} from the host {socket.gethostname()}", "it is not there", SHARED)
    objective, examples = load()
    index = Index.open(where, model=objective.fingerprint(), data=examples.fingerprint())
    _, scheme, bank, _ = restored(index, where, objective, examples, layers)
    found = tuple(layer.name for layer in bank.layers)
    if found != layers:
        odd = ", ".join(set(layers) ^ set(found))
        raise RunError(f"gradients of {len(layers)} layers", f"they differ on this host in {odd}", "one kind of host")

    def work(first: int, stop: int) -> None:
        planes, skipped = rows_of(scheme, bank, examples, first, stop, batch)
        if skipped:
            note(where, index.manifest, first, stop, skipped)
        index.put(first, planes)

    return work


def shared(where: str) -> str:
    """The place as other processes have to call it."""
    return where if "://" in where else str(Path(where).resolve())


def note(where: str, manifest: Manifest, first: int, stop: int, skipped: list[int]) -> None:
    """Say which examples of a range have no finite gradient: before its rows are written, so that none is listed
    whose note is not there."""
    said = json.dumps({"manifest": asdict(manifest), "skipped": skipped}).encode()
    place_of(where).write(f"skipped-{first:012d}-{stop:012d}.json", lambda path: path.write_bytes(said))


def gather(index: Index, where: str, read: dict[str, list[int]] | None = None) -> None:
    """List the rows that workers wrote, and keep which examples they could not take. ``read``: notes that were read
    before, by name."""
    read = {} if read is None else read
    place, own = place_of(where), asdict(index.manifest)
    for name in place.files():
        if NOTE.fullmatch(name) and name not in read:
            try:
                said = json.loads(place.read(name) or b"{}")
                if said.get("manifest") == own:  # and not of an index that was here before
                    read[name] = [int(i) for i in said["skipped"]]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                found = f"{name} is damaged: {type(error).__name__}: {error}"
                raise RunError(f"go on with the index {where}", found, "an index built again") from None
    known = [int(i) for i in index.tensors["skipped"]] if "skipped" in index.tensors else []
    skipped = sorted({*known, *(i for numbers in read.values() for i in numbers)})
    if skipped != known:
        index.keep({"skipped": np.array(skipped, np.int64)})
    index.adopt()


def forget(where: str) -> None:
    """Clear away the notes, when what they say stands in the index, and what workers that died left half-written."""
    place = place_of(where)
    for name in place.files():
        if NOTE.fullmatch(name):
            place.remove(name)
    place.tidy()


def seen(index: Index, where: str, read: dict[str, list[int]], job: Job, worker: str) -> None:
    """Raises OutputError where the rows of a range, which a worker wrote, are not to be seen from here."""
    until = time.monotonic() + ARRIVES
    while any(a < job[1] and job[0] < b for a, b in index.missing()):
        gather(index, where, read)
        if time.monotonic() > until:
            found = f"rows {job[0]}..{job[1] - 1}, written by {worker}, are not to be seen from {socket.gethostname()}"
            raise OutputError(f"write to the index {where}", found, SHARED)
        time.sleep(0.2)


# -- scoring ---------------------------------------------------------------------------------------------------------


def far(fitted: Fitted, form: Form, index: Index, where: str, workers: Workers) -> Fitted:
    """The same, with what scans all rows done by workers, each a range at a time; scores come back, not rows."""
    from ..engine.stages import Both

    scheme: Any = fitted.scheme
    first = _Far(scheme.small if isinstance(scheme, Both) else scheme)
    shelf: Any = _FarShelf(fitted.shelf, first, form, dict(fitted.bank.shapes), index, shared(where), workers)
    spread: Any = Both(first, scheme.large) if isinstance(scheme, Both) else first
    return replace(fitted, scheme=spread, shelf=shelf)


@dataclass(frozen=True)
class _Scores:
    """What comes in place of a block of rows: their scores."""

    scores: NDArray[np.float32]


class _Far:
    """A scheme that takes scores of blocks as they come, and scores what rows it is given as ever."""

    def __init__(self, near: Any) -> None:
        self.near = near
        self.asked: dict[str, NDArray[Any]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.near, name)

    def prepare(self, gradients: Mapping[str, Any]) -> Any:
        self.asked = {name: g.detach().float().cpu().numpy() for name, g in gradients.items()}
        return self.near.prepare(gradients)

    def score(self, prepared: Any, codes: Mapping[str, Any]) -> NDArray[np.float32]:
        (found,) = codes.values()
        scores: NDArray[np.float32] = found.scores if isinstance(found, _Scores) else self.near.score(prepared, codes)
        return scores


@dataclass
class _FarShelf:
    """A shelf whose blocks are scored where the workers are, in the order in which they are ready."""

    near: Any
    scheme: _Far
    form: Form
    shapes: dict[str, tuple[int, int]]
    index: Index
    where: str
    workers: Workers

    def __getattr__(self, name: str) -> Any:
        return getattr(self.near, name)

    def blocks(self, plane: str, rows: int) -> Iterator[tuple[int, Any]]:
        made, n = self.index.manifest, len(self.index)
        make = partial(
            _scorer, self.where, made.model, made.data, self.form, self.shapes, self.scheme.asked, plane, rows
        )
        # A few ranges for each worker, and whole shards, so that blocks are cut as one process cuts them.
        per = min(SCANNED, 1024 * -(-n // (1024 * 4 * (self.workers.count or 4))))
        jobs = [(a, min(a + per, n)) for a in range(0, n, per)]
        asked = f"scores of {n} rows of the index {self.where}, on Ray at {self.workers.address}"
        with closing(each(self.workers, make, jobs, asked, "the query without --ray")) as results:
            for (first, _), scores, _ in results:
                yield first, _Scores(scores)


def _scorer(
    where: str, model: str, data: str, form: Form, shapes: dict[str, tuple[int, int]],
    asked: dict[str, NDArray[Any]], plane: str, rows: int,
) -> Work:  # fmt: skip
    """In a worker: gives what scores a range. No model is needed for that."""
    import torch

    from ..engine.stages import Both

    if place_of(where).read(FILE) is None:
        raise RunError(f"reach the index {where} from the host {socket.gethostname()}", "it is not there", SHARED)
    index = Index.open(where, model=model, data=data)
    scheme: Any = form.scheme(shapes)
    held = index.tensors
    scheme.restore({k.removeprefix("learned/"): held[k] for k in held if k.startswith("learned/")})
    scheme = scheme.small if isinstance(scheme, Both) else scheme
    prepared = scheme.prepare({name: torch.from_numpy(np.array(g)) for name, g in asked.items()})

    def work(first: int, stop: int) -> NDArray[np.float32]:
        blocks = index.blocks(plane, rows=rows, only_alive=False, first=first, last=stop)
        return np.concatenate([scheme.score(prepared, {plane: codes}) for _, codes in blocks], 1)

    return work
