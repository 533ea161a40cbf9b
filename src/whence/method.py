"""Card: the literal at the top of each method file. `catalogue()` reads all cards with `ast`, importing no method."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .errors import MethodError, nearest

ROOMS = ("inputs", "parts", "ablations", "influence", "latents", "concepts", "edits", "checks", "metrics")
"""Packages whose files carry cards."""


@dataclass(frozen=True)
class Card:
    """What a method is and what it claims.

    ``claim`` is one sentence that could be false; ``falsifier`` says how: ``trial`` (``world.trial``, a function of
    that world that takes an explainer and gives paired scores; ``world.module.function``, one that takes the verb and
    gives a :class:`~whence.worlds.measured.Measured`; ``path::name``, a test), ``planted`` (the answer that was
    planted), ``expect`` (the number that the trial's mean must reach), ``control`` (what must fail) and ``seconds``.
    ``needs`` are capabilities held against the model before work starts. ``verb`` names the settings class or function.
    """

    name: str
    verb: str
    paper: str
    systems: tuple[str, ...]
    question: str
    units: tuple[str, ...]
    works_on: tuple[str, ...]
    needs: tuple[str, ...]
    cost: str
    claim: str
    falsifier: dict[str, Any]
    departs: str
    avoid: str
    module: str = ""

    def _repr_html_(self) -> str:
        from .report.fragments import card_html

        return card_html(self)


def _read(path: Path, module: str) -> Card | None:
    for node in ast.parse(path.read_text(encoding="utf8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            target = node.targets[0]
            if isinstance(target, ast.Name) and target.id == "CARD":
                values = {k.arg: ast.literal_eval(k.value) for k in node.value.keywords if k.arg}
                return Card(**values, module=module)
    return None


@cache
def catalogue() -> dict[str, Card]:
    """All cards by name, in the order of rooms and file names. No method is imported.

    >>> "daam" in catalogue()
    True
    """
    root = Path(__file__).parent
    cards: dict[str, Card] = {}
    for room in ROOMS:
        for path in sorted((root / room).glob("*.py")):
            card = _read(path, f"whence.{room}.{path.stem}")
            if card:
                cards[card.name] = card
    return cards


def card_of(name: str) -> Card:
    """The card of a method. Raises MethodError with the nearest name."""
    cards = catalogue()
    if name not in cards:
        raise MethodError(f"the method {name!r}", "no card has this name", nearest(name, cards))
    return cards[name]


def maps_pictures(card: Card) -> bool:
    """Whether the method maps the words of a picture (others score the units of a Question, or judge explanations)."""
    return card.module.startswith(("whence.inputs", "whence.ablations")) and any(
        need.startswith(("cross-attention", "joint-attention", "generate")) for need in card.needs
    )


def load(name: str) -> Any:
    """The verb of a method (its settings class, or a check's function): imports the one file."""
    from importlib import import_module

    card = card_of(name)
    return getattr(import_module(card.module), card.verb)
