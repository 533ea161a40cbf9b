"""Put methods on trial: each Card's falsifier, run against explanations that must fail.

For each picture of the trial the method and every control get a score, 0..1, chance 0.5. The verdict is the one rule of
`verdict.py` on the gain over chance, paired by picture, with ``expect - 0.5`` as the smallest gain worth having and the
strongest control as the control.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import MethodError, WhenceError
from .method import Card, card_of, catalogue
from .method import load as load_method

if TYPE_CHECKING:
    from .engine.progress import Advance
    from .explanation import Explanation
    from .run import Run
    from .score import Score
    from .worlds.controls import Explainer

PICTURES, FULL = 16, 60
CHANCE = 0.5


def trial_of(card: Card) -> Any:
    """The trial that a card names, "world.trial". Raises MethodError if there is none."""
    world, _, name = str(card.falsifier.get("trial", "")).partition(".")
    try:
        return getattr(import_module(f"whence.worlds.{world}.trials"), name)
    except (ImportError, AttributeError):
        named = card.falsifier.get("trial")
        raise MethodError(f"the trial of {card.name}", f"no trial {named!r}", "world.trial") from None


def on_trial(card: Card) -> bool:
    """Whether a card's falsifier is a world's trial of explanations (a check's falsifier is a test of its own)."""
    return hasattr(load_method(card.name), "explain") and bool(card.falsifier.get("trial"))


def _remembered(explain: Explainer) -> Explainer:
    """Asked once for each run: the shuffled control needs the same maps again."""
    known: dict[int, tuple[Run, Explanation]] = {}

    def explain_once(run: Run) -> Explanation:
        if id(run) not in known:
            known[id(run)] = (run, explain(run))  # the run is kept, so that its id stays its own
        return known[id(run)][1]

    return explain_once


def try_method(name: str, pictures: int, model: Any) -> dict[str, Any]:
    """One method's row: its score, the controls' scores on the same pictures, the verdict."""
    from .verdict import judge
    from .worlds import controls

    card = card_of(name)
    row: dict[str, Any] = {"method": name, "claim": card.claim, "trial": card.falsifier.get("trial", "")}
    if not on_trial(card):
        reason = card.falsifier.get("reason", f"its falsifier is a test: {card.falsifier.get('trial')}")
        return row | {"word": card.falsifier.get("status", "tested"), "reason": reason}
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


def prove(
    names: Sequence[str] = (), full: bool = False, advance: Advance | None = None, model: Any = None
) -> list[dict[str, Any]]:
    """Rows for the named methods (none: all), on the embedded model. Unknown names are refused before any work."""
    from .verbs import load

    chosen = [card_of(n).name for n in names] or list(catalogue())
    model = model or load()
    rows = []
    for name in chosen:
        rows.append(try_method(name, FULL if full else PICTURES, model))
        if advance:
            advance(1, name)
    return rows
