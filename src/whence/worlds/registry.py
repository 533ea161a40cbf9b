"""The worlds of questions by name, and a stranger's world by ``file.py:OBJECT``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from ..errors import RunError, nearest
from ..question import behind
from . import scorers
from .ground import Draw, World, trouble
from .trial import auc

WORLDS: Mapping[str, str] = MappingProxyType(
    {
        "twins": "whence.worlds.twins",
        "tokens": "whence.worlds.tokens",
        "motifs": "whence.worlds.motifs",
        "circuits": "whence.worlds.circuits",
        "words": "whence.worlds.shapes.words",
        "facts": "whence.worlds.facts.asking",
        "carriers": "whence.worlds.carriers",
        "documents": "whence.worlds.carriers.swaps",
        "drawn": "whence.worlds.carriers.drawn",
    }
)
KEY = "whence-ground-1"
"""The key behind the published draws; another key gives fresh ones."""
SOUND_DRAWS = 6
"""A world's model-free scorers are judged over at least this many draws."""


def from_file(spec: str, what: str) -> Any:
    """The object of ``file.py:NAME``. Raises RunError where there is no such file or name, or it fails to load."""
    place, _, name = spec.rpartition(":")
    path = Path(place)
    if not place or not path.is_file():
        raise RunError(f"the {what} {spec!r}", f"no file {place!r}", f"path/to/file.py:NAME of your {what}")
    loader = importlib.util.spec_from_file_location(f"whence_{what}_{path.stem}", path)
    assert loader is not None
    assert loader.loader is not None
    module = importlib.util.module_from_spec(loader)
    sys.modules[loader.name] = module  # where dataclasses look up the types of their fields
    try:
        loader.loader.exec_module(module)
    except Exception as error:
        raise RunError(
            f"the {what} {spec!r}", f"{path} fails: {type(error).__name__}: {error}", "a file that imports"
        ) from None
    if not hasattr(module, name):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise RunError(f"the {what} {spec!r}", f"{path} has no {name!r}", nearest(name, public))
    return getattr(module, name)


def find(name: str) -> World:
    """A world by its name or by ``file.py:OBJECT``."""
    if ".py:" in name:
        return from_file(name, "world")  # type: ignore[no-any-return]
    if name not in WORLDS:
        raise RunError(f"the world {name!r}", "no such world", f"{nearest(name, WORLDS)}, or file.py:OBJECT")
    try:
        return importlib.import_module(WORLDS[name]).WORLD  # type: ignore[no-any-return]
    except ModuleNotFoundError as error:
        raise RunError(
            f"the world {name!r}", f"{error.name} is not installed", 'pip install "whence[graphs]"'
        ) from None


def draws_of(world: World, n: int, key: str = KEY) -> list[str]:
    """The keys of ``n`` draws."""
    return [f"{key}/{world.name}/{i}" for i in range(n)]


def unsound(draw: Draw) -> str:
    """Which question of a draw is not certified, and why; "" if all are."""
    for planted in draw.planted:
        why = trouble(planted)
        if why:
            return f"{planted.name}: {why}"
    return ""


def model_free(draws: Sequence[Draw]) -> dict[str, Any]:
    """The model-free scorers that these draws can be asked: the common ones, and those of the question's own kind."""
    question = draws[0].planted[0].question
    return scorers.scorers_for(question, {name: _own(name) for name in getattr(question, "scorers", None) or {}})


def _own(name: str) -> Any:
    """The scorer of this name that belongs to the question it is given, not to the one that it was found on."""

    def score(question: Any) -> Any:
        return behind(question).scorers[name](question)

    return score


def shortcuts(draws: Sequence[Draw]) -> dict[str, tuple[float, float, float]]:
    """Mean AUC of each model-free scorer over draws, with its interval: (mean, low, high). All intervals together hold
    in 99 % of sound worlds.

    Only the question's own side is asked: on a question and its sibling together, a scorer that sees the input alone is
    right on one exactly as much as it is wrong on the other.
    """
    from ..verdict import t_interval

    found = {}
    scorers_asked = model_free(draws)
    for name, scorer in scorers_asked.items():
        values = [float(np.mean([_auc(scorer(p.question), p) for p in draw.planted])) for draw in draws]
        found[name] = (float(np.mean(values)), *t_interval(values, 0.01 / len(scorers_asked)))
    return found


def _auc(scores: Any, planted: Any) -> float:
    return auc(np.asarray(scores, float), planted.causes, frozenset(planted.arm + planted.twin) - planted.causes)


def must_be_sound(world: World, draws: Sequence[Draw]) -> None:
    """Refuse a world whose own tests fail. Raises RunError naming the world and what failed."""
    for draw in draws:
        why = unsound(draw)
        if why:
            raise RunError(f"a trial on the world {world.name!r}", f"not certified: {why}", "a world that certifies")
    if len(draws) < SOUND_DRAWS:
        return
    for name, (mean, low, high) in shortcuts(draws).items():
        if not low <= 0.5 <= high:
            raise RunError(
                f"a trial on the world {world.name!r}",
                f"{name}, which never asks the model, finds the causes: AUC {mean:.2f} [{low:.2f}, {high:.2f}]",
                "twins that differ in nothing but what the model does with them",
            )
