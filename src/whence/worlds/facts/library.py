"""A small collection of passages of the facts world, and questions that are asked of it.

Its notes say the truth about where some people were born, beside other things. A part of these facts stands in two
notes, in two forms, so that taking one of them out takes nothing away. Towns of other people stand nowhere: who asks
for them asks in vain, unless the model knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...engine.randomness import stream
from ...reading import Asked, Passage
from .corpus import KEY, LIFE, Sentence, born, quizzed, towns
from .vocabulary import PEOPLE, PLACES, THINGS, TOWNS

TWICE = 3
"""Every third fact stands in two notes."""


@dataclass(frozen=True)
class Library:
    """The notes and the questions, of the kinds "answered", "gone" and "foreign"."""

    passages: tuple[Passage, ...]
    asked: tuple[Asked, ...]


def library(*names: object, people: Sequence[str] | None = None, key: str = KEY) -> Library:
    """The library of this name. ``people``: whose towns it says (None: those whose towns were asked in training)."""
    rng = stream("facts", "library", key, *names)
    told = list(quizzed(key) if people is None else people)
    others = [p for p in PEOPLE if p not in told]
    free = [t for t in TOWNS if t not in {towns(key)[p] for p in told}]
    holding = told + told[::TWICE]
    whereabouts, belongings = rng.permutation(PEOPLE).tolist(), rng.permutation(PEOPLE).tolist()
    rooms, things = rng.permutation(PLACES).tolist(), rng.permutation(THINGS).tolist()
    notes: list[tuple[str, str]] = []
    for i, person in enumerate(holding):
        forms = LIFE["town"]
        said = forms[(i + (i >= len(told))) % len(forms)].format(who=person, value=towns(key)[person])
        relation, who, what = ("place", whereabouts, rooms) if i % 2 else ("thing", belongings, things)
        beside = Sentence(relation, who[i % len(who)], what[i % len(what)], int(rng.integers(3)))
        both = [said, beside.text]
        notes.append((" ".join(both[j] for j in rng.permutation(2)), person))
    notes = [notes[i] for i in rng.permutation(len(notes))]
    passages = tuple(Passage(text, f"note {i + 1}") for i, (text, _) in enumerate(notes))
    asked = []
    for kind, who in (("answered", told), ("gone", told), ("foreign", others)):
        for person in who:
            gold = tuple(i for i, (_, p) in enumerate(notes) if p == person)
            values = tuple(rng.permutation([t for t in free if t != towns(key)[person]])[:6].tolist())
            asked.append(Asked(born(person)[0], towns(key)[person], values, gold, kind))
    return Library(passages, tuple(asked))
