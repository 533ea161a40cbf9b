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
import logging
import os
import re
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.progress import progress
from ..errors import OutputError, RunError, WhenceError
from .contents import FILE, Manifest
from .index import Index
from .places import place_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..engine.gradients import GradientBank
    from ..engine.influence import Fitted
    from ..objective import Examples, Objective
    from .training_index import Form

    Job = tuple[int, int]
    """A range of rows: the first, and the one behind the last."""
    Work = Callable[[int, int], Any]
    Answer = tuple[bool, Any]

TRIES = 3
"""How often a range is handed out before it is given up."""
ANSWERS, PLACED, ARRIVES, GATHERED = 10.0, 60.0, 10.0, 15.0
"""Seconds: for an address to answer; for the first worker to be given a place; for what one wrote to be seen here;
between two looks for what was written."""
SCANNED = 262_144
"""Rows that a worker scores at once, at most."""
STORE = 128 << 20
"""Bytes of Ray's object store where Ray is started here: scores alone go through it."""
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""How HTTP/2 begins, which the head of Ray speaks: its answer is of the same kind, 4, as the frame at the end."""
SET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_worker_niceness": "0"}
"""What Ray reads from the environment, unless it is set. By itself it gives workers what cores others leave idle."""
NOTE = re.compile(r"skipped-\d{12}-\d{12}\.json")
SHARED = "a folder that all hosts see under one name, or an object store (s3://bucket/ix)"


@dataclass(frozen=True)
class Workers:
    """``address``: "local" starts a Ray on this machine and ends it; "auto", or host:port of a head, joins one that
    runs. ``load`` makes objective and examples in a worker, and must be importable there. ``count``: workers, else one
    for each ``threads`` cores. A Ray that this process has joined before is used as it is."""

    address: str
    load: Callable[[], tuple[Objective, Examples]]
    count: int | None = None
    threads: int = 1

    @classmethod
    def of(cls, text: str, load: Callable[[], tuple[Objective, Examples]]) -> Workers:
        """From what is typed: "local", "local:3", "auto" or host:port. Raises RunError where it cannot be joined."""
        local = re.fullmatch(r"local(?::([1-9]\d*))?", text)
        found = cls("local" if local else text, load, int(local[1]) if local and local[1] else None)
        found.check()
        return found

    def check(self) -> None:
        """Raises RunError where there is no Ray, or nobody answers at the address: before any work is done."""
        ray = _ray()
        if ray.is_initialized() or self.address in ("local", "auto"):
            return
        asked, works = f"join Ray at {self.address}", "local, local:3, auto, or host:port of the head (often 6379)"
        host, _, port = self.address.rpartition(":")
        if not host or "/" in host or not port.isdecimal():
            raise RunError(asked, "no such address", works)
        try:
            with socket.create_connection((host.strip("[]"), int(port)), ANSWERS) as line:
                line.settimeout(ANSWERS)
                line.sendall(HELLO)
                answer = line.recv(4)
        except (OSError, OverflowError, UnicodeError) as error:
            raise RunError(asked, f"nobody answers: {error}", works) from None
        # Ray itself would try for 35 s, and not say what it found.
        if answer[3:] != HELLO[-6:-5] and os.environ.get("RAY_USE_TLS", "0") == "0":
            raise RunError(asked, "something else than Ray answers", works)


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
                    _seen(index, where, read, job, worker)
                elif time.monotonic() - last > GATHERED:
                    gather(index, where, read)
                    last = time.monotonic()
                advance(note=worker)
    finally:
        gather(index, where, read)
    for job in index.missing():
        _seen(index, where, read, job, "one of the workers")


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


def _seen(index: Index, where: str, read: dict[str, list[int]], job: Job, worker: str) -> None:
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


# -- workers ---------------------------------------------------------------------------------------------------------


class Worker:
    """What runs in a process of Ray. It answers (True, what was asked) or (False, (what went wrong, what would work)):
    no exception has to travel."""

    def __init__(self) -> None:
        self._work: Work | None = None

    def place(self) -> Answer:
        return True, f"{socket.gethostname()}, process {os.getpid()}"

    def start(self, make: Callable[[], Work], threads: int) -> Answer:
        def begin() -> None:
            import torch

            torch.set_num_threads(threads)
            self._work = make()

        return _told(begin)

    def work(self, first: int, stop: int) -> Answer:
        assert self._work is not None
        return _told(partial(self._work, first, stop))


def _told(work: Callable[[], Any]) -> Answer:
    try:
        return True, work()
    except WhenceError as error:
        return False, (f"{error.asked}: {error.found}", error.would_work)
    except Exception as error:
        return False, (f"{type(error).__name__}: {error}"[:500], "")


@dataclass
class _Member:
    """A worker as the driver sees it: ``placing`` until it has a process, ``starting`` until it has its model."""

    actor: Any
    step: str = "placing"
    where: str = "a worker that was not placed yet"
    job: Job | None = None


@dataclass
class _Crew:
    """Workers, what they are at, and what is left."""

    ray: Any
    kind: Any
    queue: deque[Job]
    tries: Counter[Job] = field(default_factory=Counter)
    busy: dict[Any, _Member] = field(default_factory=dict)
    idle: list[_Member] = field(default_factory=list)
    failed: tuple[Job, str] | None = None
    last: str = "none came to an end"
    stillborn: int = 0

    def hire(self) -> None:
        member = _Member(self.kind.remote())
        self.busy[member.actor.place.remote()] = member

    def hand_out(self) -> None:
        while self.idle and self.queue and self.failed is None:
            member = self.idle.pop(0)
            member.job = self.queue.popleft()
            self.busy[member.actor.work.remote(*member.job)] = member

    @property
    def over(self) -> bool:
        """Nothing is being worked on, and nothing will be."""
        return not any(m.job for m in self.busy.values()) and (self.failed is not None or not self.queue)

    def again(self, job: Job, reason: str) -> None:
        """A range failed: once more, behind the others, or never."""
        self.last = reason
        self.tries[job] += 1
        if self.tries[job] < TRIES:
            self.queue.append(job)
        elif self.failed is None:
            self.failed = job, reason

    def died(self, member: _Member, job: Job | None, error: Exception) -> None:
        """A worker is gone: its range goes to another, and a new worker comes in its place."""
        reason = f"{member.where}, died: {_first_line(error)}"
        self.last = reason
        if job is not None:
            self.again(job, reason)
        else:
            self.stillborn += 1
        if self.failed is None and (job is not None or self.stillborn < TRIES):
            self.hire()

    def dismiss(self) -> None:
        for member in [*self.busy.values(), *self.idle]:
            with suppress(Exception):
                self.ray.kill(member.actor)


def each(
    workers: Workers, make: Callable[[], Work], jobs: list[Job], asked: str, works: str
) -> Generator[tuple[Job, Any, str]]:
    """(range, result, who) of all ranges in the order in which they are ready. ``make`` gives a worker its work.

    A worker that dies costs its range, which is handed out again. Raises RunError when a range failed TRIES times
    (what others had begun is waited for), when no worker can start, and when none is given a place.
    """
    with _joined(workers) as ray:
        kind = ray.remote(Worker).options(num_cpus=workers.threads, max_restarts=0)
        crew = _Crew(ray, kind, deque(jobs))
        total = workers.count or int(ray.cluster_resources().get("CPU", 1)) // workers.threads
        since = time.monotonic()
        try:
            for _ in range(max(1, min(total, len(jobs)))):
                crew.hire()
            while True:
                crew.hand_out()
                if crew.over:
                    break
                if not crew.busy:
                    raise RunError(asked, f"no worker is left: {crew.last}", works)
                ready, _ = ray.wait(list(crew.busy), num_returns=1, timeout=1.0)
                if not ready:
                    waiting = not crew.idle and all(m.step == "placing" for m in crew.busy.values())
                    if waiting and time.monotonic() - since > PLACED:
                        free = int(ray.available_resources().get("CPU", 0))
                        there = int(ray.cluster_resources().get("CPU", 0))
                        state = f"no worker was given a place in {PLACED:.0f} s: {free} of {there} cores are free"
                        raise RunError(asked, state, f"a Ray with {workers.threads} cores free, or {works}")
                    continue
                since = time.monotonic()
                member = crew.busy.pop(ready[0])
                job, member.job = member.job, None
                good: bool
                found: Any
                try:
                    good, found = ray.get(ready[0])
                except ray.exceptions.RayTaskError as error:  # it could not even read what it was asked
                    good, found = False, (_first_line(error.cause or error), "")
                except ray.exceptions.RayError as error:
                    crew.died(member, job, error)
                    continue
                if member.step == "placing":
                    member.step, member.where = "starting", found
                    crew.busy[member.actor.start.remote(make, workers.threads)] = member
                elif job is None and not good:  # it would fail again
                    crew.last = f"{member.where}: {found[0]}"
                    works = found[1] or works
                    ray.kill(member.actor)
                elif job is None:
                    member.step = "working"
                    crew.idle.append(member)
                else:
                    crew.idle.append(member)
                    if good:
                        crew.stillborn = 0
                        yield job, found, member.where
                    else:
                        crew.again(job, f"{member.where}: {found[0]}")
        finally:
            crew.dismiss()
    if crew.failed is not None:
        (first, stop), reason = crew.failed
        state = f"examples {first}..{stop - 1} failed {TRIES} times, at last on {reason}"
        raise RunError(asked, state, f"examples that work, then {works}")


def _first_line(error: BaseException) -> str:
    """What killed a worker, in a line: Ray tells it in a page."""
    text = str(error).strip()
    if "memory" in text.lower() and "OOM" not in text:
        return "out of memory"
    exit_detail = re.search(r"exit detail: ([^.\n]+)", text)
    return (exit_detail[1] if exit_detail else f"{type(error).__name__}: {text.splitlines()[0] if text else ''}")[:300]


@contextmanager
def _joined(workers: Workers) -> Iterator[Any]:
    """Ray, started or joined, and left as it was found."""
    workers.check()
    ray = _ray()
    if ray.is_initialized():
        with redirect_stdout(sys.stderr):
            yield ray
        return
    how: dict[str, Any] = {"address": workers.address, "log_to_driver": False, "logging_level": logging.ERROR}
    if workers.address == "local":
        cores = workers.count and workers.count * workers.threads
        how |= {"num_cpus": cores, "include_dashboard": False, "object_store_memory": STORE}
    # Ray prints on standard output that a worker died: where --json may stand.
    stack = ExitStack()
    stack.enter_context(redirect_stdout(sys.stderr))
    stack.callback(ray.shutdown)
    with stack:
        try:
            ray.init(**how)
        except Exception as error:
            asked = "start Ray here" if workers.address == "local" else f"join Ray at {workers.address}"
            found = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            raise RunError(asked, found, "a Ray of the same version that runs (`ray start --head`), or local") from None
        yield ray


def _ray() -> Any:
    for name, value in SET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise RunError("work on Ray", "it is not installed", 'pip install "whence[ray]", or no --ray') from None
    return ray
