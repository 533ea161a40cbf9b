"""How is work shared among Ray's actors? Each takes ranges, one after the other; whoever dies costs a range.

    for (first, stop), result, who in each(Workers("local", load), make, ranges, "count them", "one process"): ...

A range is two numbers, and ``make`` gives, in each worker, what works on one. Nothing here knows what the work is.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import RunError, WhenceError

if TYPE_CHECKING:
    from ..objective import Examples, Objective

    Job = tuple[int, int]
    """A range of rows: the first, and the one behind the last."""
    Work = Callable[[int, int], Any]
    Answer = tuple[bool, Any]

TRIES = 3
"""How often a range is handed out before it is given up."""
ANSWERS, PLACED = 10.0, 60.0
"""Seconds: for an address to answer; for the first worker to be given a place."""
STORE = 128 << 20
"""Bytes of Ray's object store where Ray is started here: scores alone go through it."""
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""How HTTP/2 begins, which the head of Ray speaks: its answer is of the same kind, 4, as the frame at the end."""
SET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_worker_niceness": "0"}
"""What Ray reads from the environment, unless it is set. By itself it gives workers what cores others leave idle."""


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
    stack.callback(_leave, ray)
    with stack:
        try:
            ray.init(**how)
        except Exception as error:
            asked = "start Ray here" if workers.address == "local" else f"join Ray at {workers.address}"
            found = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            raise RunError(asked, found, "a Ray of the same version that runs (`ray start --head`), or local") from None
        yield ray


def _leave(ray: Any) -> None:
    """End what was started here. That takes seconds: a second Ctrl-C must not leave half of it running."""
    at_keyboard = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if at_keyboard else None
    try:
        ray.shutdown()
    finally:
        if at_keyboard:
            signal.signal(signal.SIGINT, before or signal.default_int_handler)


def _ray() -> Any:
    for name, value in SET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise RunError("work on Ray", "it is not installed", 'pip install "whence[ray]", or no --ray') from None
    return ray
