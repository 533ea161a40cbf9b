"""Prompts that have a phrase, the same prompts with another phrase in its place, and which tokens then stand where.

>>> reword("two red circles", "red", "blue"), reword("a red circle on night", "red circle", "orange cross")
('two blue circles', 'an orange cross on night')
>>> reword("a green circle", "red", "blue") is None
True
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import PromptError
from .prompts import replace_word, split_words, word_spans

TEMPLATES = ("{}", "a photo of {}", "an image of {}", "a picture of {}")
"""The four templates of Diff-QuickFix, for a model whose own prompts nobody knows."""


class Asked(Protocol):
    """A goal: see :class:`whence.change.Goal`."""

    @property
    def old(self) -> str: ...
    @property
    def new(self) -> str: ...
    @property
    def prompts(self) -> tuple[str, ...]: ...
    @property
    def keep(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Pair:
    """One prompt said both ways. ``old`` and ``new``: the prompts; the phrases begin at word ``start`` of both and have
    so many words."""

    old: str
    new: str
    start: int
    words: tuple[int, int]


def find(prompt: str, phrase: str) -> int | None:
    """The number of the word at which the phrase begins, None where it is not there."""
    words, wanted = ([w.lower() for w in split_words(text)] for text in (prompt, phrase))
    return next((i for i in range(len(words)) if words[i : i + len(wanted)] == wanted), None)


def reword(prompt: str, old: str, new: str) -> str | None:
    """The prompt with its first ``old`` replaced, an article before it made to agree; None where it has none."""
    at = find(prompt, old)
    if at is None:
        return None
    spans = word_spans(prompt)
    last = spans[at + len(split_words(old)) - 1]
    return replace_word(prompt[: spans[at][0]] + prompt[last[0] :], at, new)


def pairs(model: Any, goal: Asked, prompts: Sequence[str] = ()) -> tuple[Pair, ...]:
    """Each prompt that has the old phrase, said both ways: those of the goal, else ``prompts``, else TEMPLATES. Raises
    PromptError where none of the goal's has it, and for words that the model never saw."""
    if "|" in goal.new:
        raise PromptError(f"{goal.old!r} as {goal.new!r}", "several phrases", "one; several get shares by uce_debias")
    for phrase in (goal.old, goal.new):
        model.words(phrase)
    chosen = goal.prompts or tuple(prompts) or tuple(t.format(goal.old) for t in TEMPLATES)
    found = []
    for old in chosen:
        at, new = find(old, goal.old), reword(old, goal.old, goal.new)
        if at is not None and new is not None and _known(model, old):
            found.append(Pair(old, new, at, (len(split_words(goal.old)), len(split_words(goal.new)))))
    if not found:
        raise PromptError(
            f"the change of {goal.old!r}", f"none of {len(chosen)} prompts has it, as {chosen[0]!r}",
            f"prompts with {goal.old!r} in them, all of whose words the model knows",
        )  # fmt: skip
    return tuple(found)


def kept(model: Any, goal: Asked, said: Sequence[Pair], most: int) -> tuple[str, ...]:
    """At most ``most`` prompts whose pictures shall stay: those of the pairs with another phrase in the place of the
    old one. Which: the goal's ``keep``, else words of its kind that the model names."""
    phrases = goal.keep
    if not phrases:
        alone = split_words(goal.old)
        phrases = model.alternatives(alone[-1], 0) if len(alone) else ()
        phrases = tuple(" ".join((*alone[:-1], p)) for p in phrases)
    else:
        for phrase in phrases:
            model.words(phrase)
    prompts = [reword(pair.old, goal.old, phrase) for pair in said for phrase in phrases]
    once = list(dict.fromkeys(p for p in prompts if p))
    stride = max(len(once) / most, 1.0) if most else 1.0
    return tuple(once[int(i * stride)] for i in range(min(len(once), most)))


def _known(model: Any, prompt: str) -> bool:
    try:
        model.words(prompt)
    except PromptError:
        return False
    return True


Places = Sequence[Sequence[int]]


def aligned(pair: Pair, old: Places, new: Places, length: int, which: str) -> list[tuple[int, int]]:
    """(token of the old prompt, token of the new one), by the words' token places in both and the axis' ``length``.
    ``which``: "last", the last token of the phrases; "later", this and all after it, the end and padding tokens
    included; "all", also those before, where the phrases' tokens are matched from their ends. Empty where an encoder
    cut the phrase."""
    ends = [pair.start + n - 1 for n in pair.words]
    a, b = (places[end] for places, end in zip((old, new), ends, strict=True))
    if not a or not b:
        return []
    p, q = a[-1], b[-1]
    last = [(p, q)]
    if which == "last":
        return last
    later = [*last, *zip(range(p + 1, length), range(q + 1, length), strict=False)]
    if which == "later":
        return later
    own = [
        [t for w in range(pair.start, end + 1) for t in places[w]] for places, end in zip((old, new), ends, strict=True)
    ]
    inner = list(zip(own[0][-2::-1], own[1][-2::-1], strict=False))
    before = range(min(own[0][0], own[1][0]))
    return [*((t, t) for t in before), *inner[::-1], *later]
