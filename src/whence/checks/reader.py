"""Does this reader read? Over many questions: where its answers come from, and what it says when the evidence is gone.

Questions of three kinds, never counted together:

* *answered*: the collection holds the answer. What is answered right goes on trial (:mod:`~whence.checks.evidence`):
  the answer was "read", known "by heart", "neither", or "nothing holds it". The rest is "wrong" or "abstains".
* *gone*: the collection holds the answer, and all passages that do, and those written for the question, are kept from
  the reader, the ranking unchanged. It should abstain; a right answer is known "by heart".
* *foreign*: asked of another collection. It should abstain as well.

A claim about *runs like this*: the replicates are the answered questions that were answered right; the effect is the
share of edits of the evidence that the answer follows, the control the share that it follows where the same edits are
made beside the evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..answers import holds
from ..errors import PromptError
from ..method import Card
from ..verdict import RUNS_LIKE_THIS, Verdict, judge, unmeasured
from .evidence import ABSTAINED, ABSTAINS, STAYS, evidence, outcome, spoken, written
from .knock_out import MOST

if TYPE_CHECKING:
    from ..engine.progress import Advance
    from ..reading import Asked, Reading

CARD = Card(
    name="reader",
    verb="reader",
    paper="Longpre et al., 2021 (memorisation ratio); Rajpurkar, Jia and Liang, 2018 (unanswerable questions); both "
    "over a collection whose ranking stays, with the verdict, are Whence's own",
    systems=(),
    question="Do this reader's answers come from what it reads, and does it say so when nothing there answers?",
    units=("passage",),
    works_on=("causal and encoder-decoder language models that read retrieved passages",),
    needs=("text", "generate"),
    cost="two texts for each other value of each question that is answered right, and four more; one for each other",
    claim="Of two models with the same right answers the one that knows them by heart is refuted, its twin supported.",
    falsifier={
        "trial": "tests/checks/test_reader.py::test_a_reader_is_supported_and_a_reciter_of_the_same_answers_refuted",
        "planted": "the embedded model, which learned towns of birth by heart, and its memory-free twin",
        "expect": 0.9,
        "control": "the same edits beside the evidence, and the answers of both models before any edit",
        "seconds": 60,
    },
    departs="The papers count substituted entities that a tagger found, and questions that people wrote to be "
    "unanswerable; here values are given, and questions become unanswerable by hiding what answers them.",
    avoid="To compare readers by accuracy: wrong answers are counted and not tried.",
)

KINDS = ("answered", "gone", "foreign")


@dataclass(frozen=True)
class Row:
    """One question: what came of it ("read", "by heart", "neither", "nothing holds it", "abstains", "wrong";
    "by accident" where a foreign passage holds the answer, "nothing found" where none was read) and what was written;
    ``joint`` and ``single`` as words, where the answer went on trial."""

    asked: Asked
    word: str
    text: str
    follows: float | None = None
    control: float | None = None
    joint: str = ""
    single: str = ""


@dataclass(frozen=True)
class ReaderTrial:
    """``verdict`` on "the answers are read in the passages", and the rows of all questions."""

    verdict: Verdict
    rows: tuple[Row, ...]

    def counts(self, kind: str) -> dict[str, int]:
        """Word -> questions of a kind."""
        words = [r.word for r in self.rows if r.asked.kind == kind]
        return {w: words.count(w) for w in dict.fromkeys(sorted(words))}

    def __str__(self) -> str:
        lines = [f"{kind}: {', '.join(f'{w} {n}' for w, n in found.items())}"
                 for kind in KINDS if (found := self.counts(kind))]  # fmt: skip
        return "\n".join([*lines, str(self.verdict)])


def reader(
    read: Callable[[str], Reading], asked: Sequence[Asked], level: str = "passage",
    abstains: Sequence[str] = ABSTAINS, advance: Advance | None = None,
) -> ReaderTrial:  # fmt: skip
    """Put a reader on trial: ``read(question)`` answers from its own collection. Raises PromptError for other kinds."""
    unknown = sorted({a.kind for a in asked} - set(KINDS))
    if unknown:
        raise PromptError(f"questions of the kind {unknown[0]!r}", "no such kind", ", ".join(KINDS))
    rows = []
    for a in asked:
        rows.append(_row(read, a, level, abstains))
        if advance:
            advance()
    tried = [r for r in rows if r.follows is not None and r.control is not None and np.isfinite(r.control)]
    claim = "the answers are read in the passages that hold them"
    said = f"{len(tried)} questions answered right, of {sum(r.asked.kind == 'answered' for r in rows)}"
    if not tried:
        why = "no question was answered right from passages that hold the answer"
        return ReaderTrial(unmeasured(claim, RUNS_LIKE_THIS, why, MOST, evidence=said), tuple(rows))
    verdict = judge(
        [float(r.follows or 0) for r in tried], {"the same edits elsewhere": [float(r.control or 0) for r in tried]},
        claim=claim, delta=MOST, readout="share of edits that the answer follows", unit="0..1", replicate="question",
        evidence=said, intervention="the answer replaced in all passages of the collection that hold it",
    )  # fmt: skip
    return ReaderTrial(verdict, tuple(rows))


def _row(read: Callable[[str], Reading], a: Asked, level: str, abstains: Sequence[str]) -> Row:
    try:
        text, reading = spoken(lambda: read(a.question))
    except PromptError:
        if a.kind == "answered":
            raise
        return Row(a, "nothing found", "")
    if a.kind == "gone" and reading:
        holding = {i for i, p in enumerate(reading.passages) if holds(p.text, a.answer)}
        text = written(reading, hidden=sorted(holding | set(a.gold)))
    found = outcome(text, a.answer, abstains)
    if found.word != STAYS or not reading:
        return Row(a, ABSTAINED if found.word == ABSTAINED else "wrong", text)
    if a.kind != "answered":
        known = a.kind == "foreign" and any(holds(reading.passages[i].text, a.answer) for i in reading.read)
        return Row(a, "by accident" if known else "by heart", text)
    e = evidence(reading, a.answer, a.values, level, abstains)
    joint, single = (o.word if o else "" for o in (e.joint, e.single))
    if not e.read:
        return Row(a, e.word, text)
    return Row(a, e.word, text, e.follows, e.verdict.control, joint, single)
