"""A reader that has no memory by construction, and one that has nothing else: bounds for trials on real prose.

The extractive reader takes the sentence that covers most of the question (its words weighed by how rare they are) and,
in it, the piece that looks like what is asked (a number after "how many", a name after "who", ...) and stands nearest
to the question's words. Where less than a share of the question is covered it says that it is not said. It is often
wrong, and that is no matter: trials are about the answers that are right.

The reciter says what it learned by heart, whatever it is given to read, and cites it all the same.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from whence.segments import split
from whence.text import TextRun, TextSettings

COVERED = 0.35
"""Share of the question's weight that a sentence must cover; set once, not tuned."""
NOT_SAID = "It is not said."
_WORD = re.compile(r"\w+(?:[-'’.,]\w+)*")
_STOPS = """a an and are as at be been but by did do does for from had has have he her his how in into is it its many
much of on or s she so such than that the their them there these they this to was were what when where which while who
whom whose why will with would year name kind type"""
_STOP = frozenset(_STOPS.split())
_NUMBER = re.compile(
    r"(?:[$£€] ?)?\d[\d,.]*\d%?|\d%?|\b(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|"
    r"forty|fifty|hundred|thousand|million|billion|half|third)\b(?:[- ](?:hundred|thousand|million|billion))?", re.I,
)  # fmt: skip
_YEAR = re.compile(r"\b(?:1\d{3}|20\d\d)\b")
_NAME = re.compile(r"\b[A-Z][\w'’.-]*(?: (?:of|the|de|von|van|and)(?= [A-Z])| [A-Z][\w'’.-]*)*")
_PLAIN = re.compile(r"\b[a-z][\w-]*(?: [a-z][\w-]*){0,2}")
_ASKS = (
    (re.compile(r"\bhow (?:many|much|old|long|far|tall|large|big)\b|\bpercent", re.I), _NUMBER),
    (re.compile(r"\bwhen\b|\b(?:what|which) (?:year|decade|century)\b", re.I), _YEAR),
    (
        re.compile(
            r"\bwho\b|\bwhom\b|\bwhere\b|\b(?:what|which) (?:\w+ )?(?:city|country|team|company|person)\b", re.I
        ),
        _NAME,
    ),
)


def stem(word: str) -> str:
    """A word without its commonest endings."""
    word = word.lower()
    for end in ("ies", "ing", "ed", "es", "s"):
        if word.endswith(end) and len(word) - len(end) >= 3:
            return word[: -len(end)]
    return word


def content(text: str) -> list[str]:
    """Stems of the words that mean something."""
    return [stem(w) for w in _WORD.findall(text) if w.lower() not in _STOP]


def rarity(texts: Sequence[str]) -> dict[str, float]:
    """Weight of each word: how few of the texts hold it."""
    held = Counter(w for t in texts for w in set(content(t)))
    return {w: math.log(1 + len(texts) / n) for w, n in held.items()}


class Speaks:
    """What both readers share: a text for a prompt in the frame of :mod:`whence.reading`."""

    name, family, fingerprint = "", "rules", ""

    def write(self, settings: TextSettings) -> TextRun:
        """See TextModel. Tokens are words; probabilities are not known."""
        told, _, rest = settings.prompt.rpartition("Question: ")
        text = " " + self.says(told, rest.removesuffix("\nAnswer:"))
        spans = np.array([m.span() for m in _WORD.finditer(text)]).reshape(-1, 2)
        read = np.array([m.span() for m in _WORD.finditer(settings.prompt)]).reshape(-1, 2)
        return TextRun(
            settings, settings.prompt, text, np.zeros(len(read), int), np.zeros(len(spans), int), read, spans,
            np.zeros(len(spans)), self.name, self.family, self.fingerprint, {}, model=self,
        )  # fmt: skip

    def says(self, told: str, question: str) -> str:
        """The answer to a question after these passages."""
        raise NotImplementedError

    def question(self, run: TextRun, segments: Any, **choices: Any) -> Any:
        """Not a language model: it has no probabilities to explain."""
        raise NotImplementedError


class Extractive(Speaks):
    """Answers by what it reads alone. ``weights``: rarity of words."""

    name = "extractive rules"

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights, self.rare = weights, max(weights.values(), default=1.0)

    def says(self, told: str, question: str) -> str:
        asked = {w: self.weights.get(w, self.rare) for w in content(question)}
        if not told.strip() or not asked:
            return NOT_SAID
        tree = split(told)
        sentences = [told[tree.segments[i].start : tree.segments[i].end] for i in tree.at("sentence")]
        covered = [sum(v for w, v in asked.items() if w in set(content(s))) for s in sentences]
        best = int(np.argmax(covered))
        if covered[best] < COVERED * sum(asked.values()):
            return NOT_SAID
        return self._piece(sentences[best], question, asked) or NOT_SAID

    def _piece(self, sentence: str, question: str, asked: Mapping[str, float]) -> str:
        places = [(m.start(), asked[stem(m[0])]) for m in _WORD.finditer(sentence) if stem(m[0]) in asked]
        kinds = [piece for pattern, piece in _ASKS if pattern.search(question)]
        for pattern in (*kinds, _NAME, _NUMBER, _PLAIN):
            found = []
            for m in pattern.finditer(sentence):
                text = m[0].strip(" .,'’")
                words = content(text)
                if not text or not words or any(w in asked for w in words):
                    continue
                near = sum(v / (12 + abs(at - m.start())) for at, v in places)
                found.append((near, text))
            if found:
                return max(found)[1]
        return ""


class Reciter(Speaks):
    """Answers by what it has by heart, {question: answer}; of the rest it reads nothing and says so."""

    name = "reciter"

    def __init__(self, known: Mapping[str, str]) -> None:
        self.known = dict(known)

    def says(self, told: str, question: str) -> str:
        return self.known.get(question, NOT_SAID)
