"""Put methods on trial: each Card's falsifier, run against explanations that must fail.

Three kinds of trial. *Pictures*: word maps of generated pictures against what the oracle sees. *Questions*: scores of
units on worlds with planted causes (`worlds/trial.py`), ours or a stranger's, method or world. In both every replicate
gives a score of 0..1, chance 0.5, for the method and for every control. *Claims*: what a method does to a model
(`worlds/measured.py`), with a chance of its own. The verdict is the one rule of `verdict.py` on the gain over chance,
paired by replicate, with ``expect - chance`` as the smallest gain worth having, and the strongest control as control.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import MethodError, RunError, WhenceError
from .method import Card, card_of, catalogue
from .method import load as load_method

if TYPE_CHECKING:
    from .engine.journal import Journal
    from .engine.progress import Advance
    from .explanation import Explanation
    from .question import Budget
    from .question import Explainer as Answers
    from .run import Run
    from .score import Score
    from .worlds.controls import Explainer
    from .worlds.ground import Draw, World
    from .worlds.measured import Measure
    from .worlds.trial import DrawResult

PICTURES, FULL = 16, 60
DRAWS, FULL_DRAWS = 6, 20
BRIEF = 20
"""Seconds that the trial of a claim may take within the trial of everything."""
NOT_NOW = "not tried now"
CHANCE = 0.5
EXPECT = 0.9
"""What a stranger's explainer must reach on single causes, as our own methods must."""


def trial_of(card: Card) -> Any:
    """The trial of pictures that a card names, "world.trial". Raises MethodError if there is none."""
    world, _, name = str(card.falsifier.get("trial", "")).partition(".")
    try:
        return getattr(import_module(f"whence.worlds.{world}.trials"), name)
    except (ImportError, AttributeError):
        named = card.falsifier.get("trial")
        raise MethodError(f"the trial of {card.name}", f"no trial {named!r}", "world.trial") from None


def asks_questions(card: Card) -> bool:
    """Whether a card's trial is one of questions on a world (else of pictures, or a test of its own)."""
    from .worlds.registry import WORLDS

    return str(card.falsifier.get("trial", "")).partition(".")[0] in WORLDS


def measured_by(card: Card) -> Measure | None:
    """The function that a card names as ``world.module.function``, else None. Raises MethodError if there is none."""
    named = str(card.falsifier.get("trial", ""))
    if "::" in named or named.count(".") != 2:
        return None
    world, module, name = named.split(".")
    try:
        return getattr(import_module(f"whence.worlds.{world}.{module}"), name)  # type: ignore[no-any-return]
    except (ImportError, AttributeError) as error:
        raise MethodError(
            f"the trial of {card.name}", f"no trial {named!r}: {error}", "world.module.function"
        ) from None


def on_trial(card: Card) -> bool:
    """Whether a card's falsifier is a world's trial (else it is a test of its own, ``path::name``)."""
    trial = str(card.falsifier.get("trial", ""))
    return measured_by(card) is not None or (
        bool(trial)
        and "::" not in trial
        and hasattr(load_method(card.name), "explain" if "influence" not in card.module else "fit")
    )


# --- pictures --------------------------------------------------------------------------------------------------------


def _remembered(explain: Explainer) -> Explainer:
    """Asked once for each run: the shuffled control needs the same maps again."""
    known: dict[int, tuple[Run, Explanation]] = {}

    def explain_once(run: Run) -> Explanation:
        if id(run) not in known:
            known[id(run)] = (run, explain(run))  # the run is kept, so that its id stays its own
        return known[id(run)][1]

    return explain_once


def _of_claim(card: Card, measure: Measure, n: int, model: Any, advance: Advance | None) -> dict[str, Any]:
    """What a claim's trial measured, and the verdict."""
    from .score import Score
    from .verdict import judge

    began = time.perf_counter()
    try:
        # A claim is one step of the whole; what it counts by itself is only told.
        tell = advance and (lambda _=1, note="": advance(0, note or card.name))
        found = measure(load_method(card.name), n, model, tell)
    except WhenceError as error:
        return {"word": "not shown", "reason": f"asked: {error.asked}; found: {error.found}"}
    verdict = judge(
        [v - found.chance for v in found.values],
        {c: [v - found.chance for v in values] for c, values in found.controls.items()},
        claim=card.claim,
        delta=float(card.falsifier["expect"]) - found.chance,
        readout=found.name,
        unit=found.unit if found.chance == 0 else f"{found.unit}, above {found.chance:g}",
        alpha=0.05,
        replicate=found.replicate,
    )
    return {
        "word": verdict.word,
        "score": Score.of(found.name, found.unit, found.values).record(),
        "expect": card.falsifier["expect"],
        "controls": {c: Score.of(found.name, found.unit, v).record() for c, v in found.controls.items()},
        "verdict": verdict.record(),
        "details": dict(found.details),
        "seconds": round(time.perf_counter() - began, 1),
    }


def try_method(name: str, pictures: int, model: Any, advance: Advance | None = None) -> dict[str, Any]:
    """One method's row on pictures or of a claim: its score, the controls' scores on the same pictures, the verdict."""
    from .verdict import judge
    from .worlds import controls

    card = card_of(name)
    row: dict[str, Any] = {"method": name, "claim": card.claim, "trial": card.falsifier.get("trial", "")}
    if not on_trial(card):
        reason = card.falsifier.get("reason", f"its falsifier is a test: {card.falsifier.get('trial')}")
        return row | {"word": card.falsifier.get("status", "tested"), "reason": reason}
    measure = measured_by(card)
    if measure is not None:
        return row | _of_claim(card, measure, pictures, model, advance)
    trial, explain = trial_of(card), _remembered(load_method(name)().explain)
    began = time.perf_counter()
    try:
        score: Score = trial(explain, pictures, model)
        seconds = time.perf_counter() - began
        arms = {"shuffled": trial(controls.shuffled(explain), pictures, model)}
        arms |= {n: trial(control, pictures, model) for n, control in controls.CONTROLS.items()}
    except WhenceError as error:
        return row | {"word": "not shown", "reason": f"asked: {error.asked}; found: {error.found}"}
    verdict = judge(
        [v - CHANCE for v in score.values],
        {n: [v - CHANCE for v in arm.values] for n, arm in arms.items()},
        claim=card.claim,
        delta=float(card.falsifier["expect"]) - CHANCE,
        readout=score.name,
        unit=f"{score.unit}, above chance",
        alpha=0.05,
        replicate="picture",
    )
    return row | {
        "word": verdict.word,
        "score": score.record(),
        "expect": card.falsifier["expect"],
        "controls": {n: arm.record() for n, arm in arms.items()},
        "verdict": verdict.record(),
        "seconds": round(seconds, 1),
    }


# --- questions -------------------------------------------------------------------------------------------------------


def _results(
    name: str,
    explain: Answers,
    draws: Sequence[Draw],
    budget: Budget,
    structures: Sequence[str] = (),
    journal: Journal | None = None,
    advance: Advance | None = None,
    version: str = "",
) -> list[DrawResult]:
    from .worlds.trial import DrawResult, try_draw

    found = []
    for draw in draws:
        piece = (name, version, draw.world, draw.key, budget, tuple(structures))
        record = journal.get(*piece) if journal else None
        result = DrawResult.of(record) if record else try_draw(explain, draw, structures, budget)
        if journal and not record:
            journal.put(result.record(), *piece)
        found.append(result)
        if advance:
            advance(1, f"{name} on {draw.world}")
    return found


def _panel(results: Sequence[DrawResult], world: World) -> dict[str, dict[str, float]]:
    """Mean over draws of each metric for each structure."""
    import numpy as np

    structures = [s for s in world.structures if any(t.structure == s for t in results[0].tried)]
    metrics = sorted({m for r in results for t in r.tried for m in t.values})
    return {s: {m: round(float(np.mean([r.mean(m, [s]) for r in results])), 4) for m in metrics} for s in structures}


_CONTROLS: dict[tuple[Any, ...], tuple[Sequence[Draw], list[float]]] = {}
"""What controls scored on draws; the draws are kept with it, so that their ids stay their own."""


def try_explainer(
    name: str,
    explain: Answers,
    world: World,
    draws: Sequence[Draw],
    *,
    claim: str = "",
    structure: str = "single",
    expect: float = EXPECT,
    budget: Budget | None = None,
    journal: Journal | None = None,
    advance: Advance | None = None,
    version: str = "",
    asked_of: Sequence[str] = (),
) -> dict[str, Any]:
    """One explainer's row on draws of a world: AUC on one structure with its verdict, the controls on the same
    questions, and the panel of all metrics for all structures. ``version``: of an explainer or world outside this
    package, so that a journal does not take the work of another one for its own. ``asked_of``: structures in the panel
    (none: all)."""
    import numpy as np

    from .question import Budget
    from .score import Score
    from .verdict import judge
    from .worlds import trial
    from .worlds.registry import model_free

    limits, explain = budget or Budget(), trial.once(explain)
    row: dict[str, Any] = {
        "method": name,
        "claim": claim or f"{name} finds what caused the outcome: {world.name}.{structure}",
        "trial": f"{world.name}.{structure}",
        "expect": expect,
        "budget": {"forwards": limits.forwards, "backwards": limits.backwards, "seconds": limits.seconds},
    }
    if structure not in world.structures:
        return row | {"word": "not shown", "reason": f"the world {world.name} has no structure {structure!r}"}
    began = time.perf_counter()
    results = _results(name, explain, draws, limits, asked_of, journal=journal, advance=advance, version=version)
    seconds = time.perf_counter() - began
    reasons = sorted({reason for r in results for t in r.tried for reason in t.reasons})
    asked = [t for r in results for t in r.tried]
    own = [r.mean("auc", [structure]) for r in results]
    arms: dict[str, Answers] = {"random": trial.random_scores}
    arms |= {f"model-free: {n}": s for n, s in model_free(draws).items()}
    if not reasons:
        arms["shuffled"] = trial.shuffled(explain)

    def control(n: str, arm: Answers) -> list[float]:
        piece = f"{name}, shuffled" if n == "shuffled" else n
        # All but the shuffled one are the same for every explainer of these draws, and take longer than many of those.
        known = _CONTROLS.setdefault((n, structure, limits, *map(id, draws)), (draws, [])) if n != "shuffled" else ()
        if not known or not known[1]:
            found = _results(piece, arm, draws, limits, [structure], journal=journal, version=version)
            values = [r.mean("auc", [structure]) for r in found]
            if known:
                known[1].extend(values)
            return values
        return list(known[1])

    controls = {n: control(n, arm) for n, arm in arms.items()}
    unit = "area under the ROC curve, causes against arm and twin, chance 0.5"
    verdict = judge(
        [v - CHANCE for v in own],
        {n: [v - CHANCE for v in values] for n, values in controls.items()},
        claim=str(row["claim"]),
        delta=expect - CHANCE,
        readout=str(row["trial"]),
        unit=f"{unit}, above chance",
        alpha=0.05,
        replicate="draw",
    )
    row |= {
        "word": verdict.word,
        "score": Score.of(str(row["trial"]), unit, own).record(),
        "controls": {n: Score.of(str(row["trial"]), unit, v).record() for n, v in controls.items()},
        "verdict": verdict.record(),
        "panel": _panel(results, world),
        "spent": {
            "forwards": round(float(np.mean([t.spent.forwards for t in asked]))),
            "backwards": round(float(np.mean([t.spent.backwards for t in asked]))),
            "seconds": round(float(np.mean([t.spent.seconds for t in asked])), 4),
        },
        "draws": [d.key for d in draws],
        "seconds": round(seconds, 1),
    }
    if reasons:
        row |= {"reason": "; ".join(reasons)}
        if all(t.reasons for t in asked):
            row |= {"word": "not shown"}
    return row


class Ground:
    """The worlds of a trial, each drawn once and checked before anything is tried on it."""

    def __init__(self, draws: int, key: str | None = None) -> None:
        from .worlds.registry import KEY

        self._n, self._key = draws, key or KEY
        self.drawn: dict[str, tuple[World, list[Draw]]] = {}

    def __getitem__(self, name: str) -> tuple[World, list[Draw]]:
        """A world and its draws. Raises RunError for an unknown world and for one whose own tests fail."""
        from .worlds import registry

        if name not in self.drawn:
            world = registry.find(name)
            try:
                drawn = [world.draw(key) for key in registry.draws_of(world, self._n, self._key)]
                registry.must_be_sound(world, drawn)
            except WhenceError:
                raise
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
                raise RunError(f"a trial on the world {name!r}", found, "a world whose draws can be made") from error
            self.drawn[name] = (world, drawn)
        return self.drawn[name]


def _explainer(name: str) -> tuple[str, Answers, Card | None]:
    """A method by the name of its card, or a stranger's by ``file.py:function``."""
    if ".py:" in name:
        from .worlds.registry import from_file

        return name.rpartition(":")[2], from_file(name, "explainer"), None
    from .verbs import explainer

    return name, explainer(name), card_of(name)


@dataclass(frozen=True)
class _Trials:
    """What all rows of one call share; it can be sent to another process."""

    full: bool
    world: str | None
    key: str | None
    journal: Path | None
    brief: bool = False
    """Each method on the structure of its Card alone."""

    def open(self) -> tuple[Ground, Journal | None]:
        """Its worlds, none drawn yet, and its journal."""
        from .engine.journal import Journal

        return Ground(FULL_DRAWS if self.full else DRAWS, self.key), Journal(self.journal) if self.journal else None


def _pieces(name: str, trials: _Trials) -> int:
    """How many steps a row counts: draws of a question trial, one for each other method; the bounds count none."""
    if name.startswith(BOUNDS):
        return 0
    questions = ".py:" in name or bool(trials.world) or asks_questions(card_of(name))
    return (FULL_DRAWS if trials.full else DRAWS) if questions else 1


def _rows(
    name: str, trials: _Trials, opened: tuple[Ground, Journal | None], advance: Advance | None, model: Any = None
) -> list[dict[str, Any]]:
    """The row of one method, or those of a world's bounds."""
    ground, journal = opened
    if name.startswith(BOUNDS):
        return _bounds(name.removeprefix(BOUNDS), ground, journal, advance, trials.full)
    if ".py:" in name or trials.world or asks_questions(card_of(name)):
        return [_on_questions(name, trials, ground, journal, advance)]
    card = card_of(name)
    if trials.brief and measured_by(card) is not None and card.falsifier["seconds"] > BRIEF:
        if advance:
            advance(1, name)
        reason = f"its trial takes {card.falsifier['seconds']} s: `whence prove {name}`, or --full"
        told = {"method": name, "claim": card.claim, "trial": card.falsifier["trial"]}
        return [told | {"word": NOT_NOW, "reason": reason}]
    if model is None:
        from .verbs import load

        model = load() if on_trial(card) else None
    pictures = FULL if trials.full else PICTURES
    piece = (name, "pictures", pictures, model.fingerprint if model else "")
    row = (journal and journal.get(*piece)) or try_method(name, pictures, model, advance)
    if journal:
        journal.put(row, *piece)
    if advance:
        advance(1, name)
    return [row]


@cache
def _opened(trials: _Trials) -> tuple[Ground, Journal | None]:
    """A worker draws each world once, whatever rows it is given."""
    return trials.open()


def _rows_elsewhere(names: Sequence[str], trials: _Trials, steps: Any) -> dict[str, list[dict[str, Any]]]:
    """:func:`_rows` of each in a worker process, their progress told through a queue."""
    import torch

    torch.set_num_threads(1)
    return {n: _rows(n, trials, _opened(trials), lambda n=1, note="": steps.put((n, note))) for n in names}


def prove(
    names: Sequence[str] = (),
    full: bool = False,
    advance: Advance | None = None,
    model: Any = None,
    world: str | None = None,
    key: str | None = None,
    journal: Path | None = None,
    jobs: int = 1,
) -> list[dict[str, Any]]:
    """Rows for the named methods (none: all). Unknown names are refused before any work.

    Pictures are made by ``model``, else by the embedded one. Questions come from the world that the Card names, or from
    ``world``; ``full`` takes as many draws and pictures as the published numbers had. A trial of everything asks each
    method for the structure of its Card alone, and leaves out claims that take long; one that is named or ``full`` asks
    for all of the world's structures. ``names`` may be ``file.py:function``, an explainer of yours. ``journal``: a file
    that keeps finished draws, so that a stopped trial goes on. ``jobs``: processes that share the rows; the numbers do
    not depend on it.
    """
    cards = catalogue()
    chosen = [n if ".py:" in n else card_of(n).name for n in names]
    if world:
        from .worlds import registry

        registry.find(world)
        chosen = chosen or [n for n, c in cards.items() if asks_questions(c)]
    trials = _Trials(full, world, key, journal, brief=not (names or full or world))
    tasks = chosen or list(cards)
    if not names:
        tasks = [*tasks, *(BOUNDS + w for w in ([world] if world else _worlds_of(tasks)))]
    if jobs > 1 and len(tasks) > 1 and model is None:
        found = _spread(tasks, trials, jobs, advance)
    else:
        opened = trials.open()
        found = {task: _rows(task, trials, opened, advance, model) for task in tasks}
    return together([row for task in tasks for row in found[task]])


def together(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows, judged as the many claims that they are (:func:`whence.verdict.correct`). Bounds claim nothing."""
    from .verdict import Verdict, correct

    claims = [i for i, row in enumerate(rows) if "verdict" in row and "bound" not in row]
    rows = list(rows)
    for i, verdict in zip(claims, correct([Verdict(**rows[i]["verdict"]) for i in claims]), strict=True):
        rows[i] = rows[i] | {"verdict": verdict.record()}
        if rows[i]["word"] != verdict.word and rows[i]["word"] == "supported":
            rows[i] |= {"word": verdict.word, "reason": verdict.details["why"]}
    return rows


def _worlds_of(names: Iterable[str]) -> list[str]:
    """The worlds of questions in which these methods are tried, each once."""
    return sorted({str(c.falsifier["trial"]).partition(".")[0] for c in map(card_of, names) if asks_questions(c)})


def _end_with_parent() -> None:
    """In a process that was started by another: end when that one does, also where it could not say so any more."""
    from multiprocessing import connection, parent_process
    from threading import Thread

    parent = parent_process()
    assert parent

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def _spread(tasks: Sequence[str], trials: _Trials, jobs: int, advance: Advance | None) -> dict[str, Any]:
    """Rows from several processes."""
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context
    from multiprocessing.managers import SyncManager
    from threading import Thread

    context = get_context("spawn")  # a forked process may hang in the threads that torch began before
    manager = SyncManager(ctx=context)
    manager.start(_end_with_parent)
    with manager:
        steps = manager.Queue()

        def tell() -> None:
            while (step := steps.get()) is not None:
                if advance:
                    advance(*step)

        teller = Thread(target=tell, daemon=True)
        teller.start()
        workers = ProcessPoolExecutor(min(jobs, len(tasks)), context, _end_with_parent)
        try:
            begun = [
                workers.submit(_rows_elsewhere, together, trials, steps) for together in _shares(tasks, trials, jobs)
            ]
            found: dict[str, Any] = {}
            for done in as_completed(begun):
                found |= done.result()
        except BrokenProcessPool:
            raise RunError(
                f"{len(tasks)} rows in {jobs} processes",
                "a process ended without a word: out of memory, most likely",
                "--jobs 1; with a journal, finished draws are kept",
            ) from None
        except BaseException:
            # A worker would go on to the rows that were dealt to it before.
            for process in list((workers._processes or {}).values()):
                process.terminate()
            raise
        finally:
            workers.shutdown(cancel_futures=True)
            steps.put(None)
            teller.join()
    return found


def _shares(tasks: Sequence[str], trials: _Trials, jobs: int) -> list[list[str]]:
    """Tasks that one process does, the longest share first, by what Cards say. Those of one world stay together, as its
    draws have to be made and certified once in each process; one that takes more than its part of all is halved."""

    def seconds(task: str) -> float:
        return 40.0 if task.startswith(BOUNDS) or ".py:" in task else float(card_of(task).falsifier.get("seconds", 0))

    def world(task: str) -> str:
        if task.startswith(BOUNDS):
            return task.removeprefix(BOUNDS)
        if trials.world or ".py:" in task:
            return trials.world or "twins"
        return str(card_of(task).falsifier.get("trial", task)).partition(".")[0]

    shares: dict[str, list[str]] = {}
    for task in sorted(tasks, key=seconds, reverse=True):
        shares.setdefault(world(task), []).append(task)
    most = sum(map(seconds, tasks)) / jobs * 1.2
    found = []
    for share in shares.values():
        whole = len(share) < 2 or sum(map(seconds, share)) <= most
        found += [share] if whole else [share[::2], share[1::2]]
    return sorted(found, key=lambda share: -sum(map(seconds, share)))


BOUNDS = "bounds of "


def _version(*specs: str) -> str:
    """Hash of the files among these, ``file.py:NAME`` each."""
    files = [Path(spec.rpartition(":")[0]) for spec in specs if ".py:" in spec]
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in files)).hexdigest()[:16] if files else ""


def _bounds(
    name: str, ground: Ground, journal: Journal | None, advance: Advance | None, full: bool
) -> list[dict[str, Any]]:
    """Brute force, the ceiling, and random scores, the floor, on one world; unless ``full`` on its first structure
    alone and with a third of the draws, as brute force asks the model some ten thousand times a question. Where to ask
    is to train again, there is no ceiling: it would take hours."""
    from .question import Budget
    from .worlds import trial

    try:
        world, draws = ground[name]
    except RunError:
        return []  # each method's own row says why
    ends: tuple[tuple[str, Answers, Budget, str], ...] = (
        ("brute_force", trial.brute_force if full else trial.brief_force, Budget(forwards=20_000), "ceiling"),
        ("random", trial.random_scores, Budget(), "floor"),
    )
    rows = []
    trains = "training examples" in draws[0].planted[0].question.capabilities
    for label, explain, budget, bound in ends[1:] if trains else ends:
        if advance:
            advance(0, f"{label} on {name}")
        row = try_explainer(
            label, explain, world, draws, structure=world.structures[0], budget=budget, journal=journal,
            version=_version(name), asked_of=() if full else world.structures[:1],
        )  # fmt: skip
        rows.append(row | {"method": f"{label} on {world.name}", "bound": bound})
    return rows


def _on_questions(
    name: str, trials: _Trials, ground: Ground, journal: Journal | None, advance: Advance | None
) -> dict[str, Any]:
    world = trials.world
    label, explain, card = _explainer(name)
    place, _, structure = str(card.falsifier["trial"]).partition(".") if card else ("twins", ".", "single")
    if card and not asks_questions(card):
        raise MethodError(
            f"{label} on the world {world!r}", f"its trial is {card.falsifier['trial']}: it maps pictures",
            ", ".join(n for n, c in catalogue().items() if asks_questions(c)),
        )  # fmt: skip
    try:
        found, draws = ground[world or place]
    except RunError as error:
        if world or not card:
            raise
        # The other methods' trials go on.
        row = {"method": label, "claim": card.claim, "trial": card.falsifier["trial"], "word": "not shown"}
        return row | {"reason": f"asked: {error.asked}; found: {error.found}"}
    if not card or structure not in found.structures:
        structure = found.structures[0]
    more: dict[str, Any] = {}
    if card and card.falsifier["trial"] == f"{found.name}.{structure}":
        more = {"claim": card.claim, "expect": float(card.falsifier["expect"])}
    return try_explainer(
        label, explain, found, draws, structure=structure, journal=journal, advance=advance,
        version=_version(name, world or ""), asked_of=[structure] if trials.brief else (), **more,
    )  # fmt: skip


def pieces(names: Iterable[str], full: bool, world: str | None) -> int:
    """How many steps :func:`prove` will count."""
    chosen = list(names) or [n for n, c in catalogue().items() if not world or asks_questions(c)]
    return sum(_pieces(n, _Trials(full, world, None, None)) for n in chosen)
