"""Was the answer read in the passages that were found, or known by heart? Take the evidence from the whole collection.

Knocking out the passage that an explanation cites shows little: another passage says the same, and the next search
finds it. So all passages of the collection that hold the answer (in any case, with any punctuation) go together:

* *edit*: in all of them another value stands where the answer stood, again and again. Does the answer follow it, stay,
  or does the model say that it does not know? The one primary number is the share of edits that it follows.
* *joint*: all of them are taken out. *single*: only the best one is, as most tools would do. *elsewhere*: as many that
  do not hold the answer are, and the answer should stay.

A passage taken out is passed over in the ranking, and the next one in it takes its place; a sentence taken out leaves
its passage standing (``level``). Nothing is ever indexed again: without a passage the other scores would move, and the
model would read other passages for another reason than the evidence.

*This run*: the replicates are the other values. Control: the same edits made in sentences that do not hold the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..answers import holds, put
from ..errors import MethodError, PromptError, RunError
from ..method import Card
from ..segments import split
from ..verdict import THIS_RUN, Verdict, judge_run, unmeasured
from .knock_out import MOST, end_with

if TYPE_CHECKING:
    from ..engine.progress import Advance
    from ..reading import Reading

CARD = Card(
    name="evidence",
    verb="evidence",
    paper="Longpre et al., Entity-Based Knowledge Conflicts in Question Answering, 2021 (the edits); joint knock-out "
    "over a collection whose ranking stays, and the verdict, are Whence's own",
    systems=(),
    question="Was the answer read in the passages that were found, or known by heart?",
    units=("passage", "sentence"),
    works_on=("causal and encoder-decoder language models that read retrieved passages",),
    needs=("text", "generate"),
    cost="two texts for each other value, and three more",
    claim="An answer known by heart is caught although the right passage is cited; a memory-free twin of the model, "
    "which gives the same answer from the same passages, passes.",
    falsifier={
        "trial": "tests/checks/test_evidence.py::test_the_model_that_knows_it_by_heart_is_caught_and_its_twin_passes",
        "planted": "two models: one learned by heart where people were born, in its twin's training this was no use",
        "expect": 0.9,
        "control": "the passages, the ranking and the answer, which are the same for both",
        "seconds": 30,
    },
    departs="The paper substitutes named entities that a tagger finds; here the other values are given. Its passages "
    "are one for each question; here all that hold the answer are changed together.",
    avoid="Where the answer is no piece of a passage (a sum, a yes), or where the question says it: nothing can be "
    "taken out. A passage that says the answer in other words is not found, and then reading looks like memory.",
)

ABSTAINS = ("not said", "not known", "unknown", "do not know", "don't know", "cannot be answered", "no answer",
            "not mentioned", "cannot find", "unanswerable")  # fmt: skip
"""Words by which models say that the passages do not say it."""
LEVELS = ("passage", "sentence")
Spot = tuple[int, int, int]
STAYS, ABSTAINED, CHANGES = "stays", "abstains", "changes"


@dataclass(frozen=True)
class Outcome:
    """What was written: it holds the old answer ("stays"), says that it is not known ("abstains"), or says something
    else ("changes")."""

    text: str
    word: str


@dataclass(frozen=True)
class Evidence:
    """What came of it.

    ``verdict``: on "the answer was read in these passages". ``holding``: numbers of all passages of the collection that
    hold the answer; ``read``: those of them that the model had read, the best first. ``follows``, ``stays``,
    ``abstains``: shares of the edits. ``joint``, ``single``, ``elsewhere``: see above (None: could not be asked).
    """

    verdict: Verdict
    holding: tuple[int, ...] = ()
    read: tuple[int, ...] = ()
    follows: float = 0.0
    stays: float = 0.0
    abstains: float = 0.0
    joint: Outcome | None = None
    single: Outcome | None = None
    elsewhere: Outcome | None = None

    @property
    def word(self) -> str:
        """Where the answer came from: "read", "by heart", "neither" (it goes when the evidence changes, to nothing that
        the evidence says), or "nothing holds it"."""
        if not self.read:
            return "nothing holds it"
        if self.follows > MOST:
            return "read"
        return "by heart" if self.stays > MOST else "neither"

    def __str__(self) -> str:
        lines = [f"the answer came from: {self.word}"]
        if self.read:
            lines.append(
                f"edited wherever it stands ({len(self.holding)} passages): follows {self.follows:.0%}, "
                f"stays {self.stays:.0%}, abstains {self.abstains:.0%}"
            )
        for name in ("joint", "single", "elsewhere"):
            outcome: Outcome | None = getattr(self, name)
            if outcome:
                lines.append(f"{name} knock-out: {outcome.word}, {outcome.text.strip()!r}")
        return "\n".join(lines)


def outcome(text: str, answer: str, abstains: Sequence[str] = ABSTAINS) -> Outcome:
    """Which of the three a text is. Nothing written is no answer.

    >>> outcome("Anna was born in a town that is not said.", "Velm").word
    'abstains'
    """
    if holds(text, answer):
        return Outcome(text, STAYS)
    said = " ".join(text.lower().replace("’", "'").split())
    silent = not said.strip(" .") or any(a in said for a in abstains)
    return Outcome(text, ABSTAINED if silent else CHANGES)


def evidence(
    reading: Reading, answer: str, values: Sequence[str], level: str = "passage", abstains: Sequence[str] = ABSTAINS,
    advance: Advance | None = None,
) -> Evidence:  # fmt: skip
    """Put the evidence of a reading on trial.

    ``answer``: the piece of its text that is in doubt; ``values``: others that could stand in its place, three or more
    that the prompt does not say; ``level``: what is taken out, passages (passed over in the ranking) or sentences (cut
    where they stand); ``advance`` is called for each text (:func:`texts_of`). Raises PromptError where the answer is
    not in the text or stands in the question, MethodError for values that cannot be told from it.
    """
    reading.model  # noqa: B018 - refuses before work starts
    if level not in LEVELS:
        raise MethodError(f"the check evidence by {level}s", "no such level", ", ".join(LEVELS))
    if not holds(reading.text, answer):
        raise PromptError(f"the answer {answer!r}", f"the model wrote {reading.text!r}", "a piece of the output")
    if holds(reading.asked, answer):
        raise PromptError(f"the answer {answer!r}", "the question says it", "an answer that only passages can give")
    able = tuple(dict.fromkeys(v for v in values if not holds(reading.run.prompt, v) and not holds(v, answer)))
    if len(able) < 3:
        raise MethodError(
            f"the check evidence with {len(values)} other values", f"{len(able)} that stand nowhere in the prompt",
            "three or more values that could be the answer and are not said",
        )  # fmt: skip
    claim = f"{answer!r} was read in the passages that hold it"
    texts = {i: reading.texts.get(i, p.text) for i, p in enumerate(reading.passages)}
    holding = tuple(i for i, text in texts.items() if holds(text, answer))
    read = tuple(i for i in reading.read if i in holding)
    if not read:
        return Evidence(unmeasured(claim, THIS_RUN, "no passage that was read holds the answer", MOST), holding)

    def write(edits: Mapping[int, str] | None = None, hidden: Sequence[int] = ()) -> str:
        text = written(reading, edits, hidden)
        if advance:
            advance()
        return text

    told = [write({i: put(texts[i], answer, v) for i in holding}) for v in able]
    found = [outcome(t, answer, abstains).word for t in told]
    follows = [float(holds(t, v)) for t, v in zip(told, able, strict=True)]
    # A follower may name the new value and nothing else: an answer that still holds the old one does not follow.
    follows = [f * (w != STAYS) for f, w in zip(follows, found, strict=True)]
    idle = _spots(texts, reading.read, answer, holding=False)
    n = len(_spots(texts, read, answer, holding=True)) or len(read)
    controls: dict[str, list[float]] = {}
    if idle:
        turned = [[*idle, *idle][k % len(idle) :][: min(n, len(idle))] for k in range(len(able))]
        edited = [
            write(_edited(texts, spots, lambda said, v=v: end_with(said, v)))  # type: ignore[misc]
            for spots, v in zip(turned, able, strict=True)
        ]
        controls["the same edits elsewhere"] = [float(holds(t, v)) for t, v in zip(edited, able, strict=True)]
    verdict = judge_run(
        follows, controls, claim=claim, delta=MOST, readout="share of edits that the answer follows", unit="0..1",
        evidence=f"{len(holding)} of {len(texts)} passages hold it, {len(read)} of the {len(reading.read)} read",
        intervention=f"{answer!r} replaced in all of them by {', '.join(map(repr, able))}",
    )  # fmt: skip
    others = [i for i in reading.read if i not in holding][: len(read)]
    outs: dict[str, Outcome | None] = dict.fromkeys(("joint", "single", "elsewhere"))
    for name, numbers in (("joint", holding), ("single", read[:1]), ("elsewhere", others)):
        if level == "passage":
            outs[name] = outcome(write(hidden=numbers), answer, abstains) if numbers else None
        else:
            spots = idle[:n] if name == "elsewhere" else _spots(texts, numbers, answer, holding=True)
            cut = _edited(texts, spots, lambda _: "")
            if name != "elsewhere":
                # A name such as "J. R. Smith" may have been split between two sentences.
                cut = {i: put(cut.get(i, texts[i]), answer, "...") for i in numbers}
            outs[name] = outcome(write(cut), answer, abstains) if cut else None
    return Evidence(
        verdict, holding, read, float(np.mean(follows)), float(np.mean([w == STAYS for w in found])),
        float(np.mean([w == ABSTAINED for w in found])), **outs,
    )  # fmt: skip


def texts_of(values: Sequence[str]) -> int:
    """How many texts are written at most."""
    return 2 * len(values) + 3


def written(reading: Reading, edits: Mapping[int, str] | None = None, hidden: Sequence[int] = ()) -> str:
    """What a reading becomes with passages edited or hidden; "" where the model ends at once."""
    return spoken(lambda: reading.again(edits or {}, hidden))[0]


def spoken(ask: Callable[[], Reading]) -> tuple[str, Reading | None]:
    """What is written and read; nothing, where the model ends at once, is a text as well: it abstains."""
    try:
        reading = ask()
    except RunError as error:
        if "wrote nothing" not in error.found:
            raise
        return "", None
    return reading.text, reading


def _spots(texts: Mapping[int, str], numbers: Sequence[int], answer: str, holding: bool) -> list[Spot]:
    """Sentences of these passages that hold the answer, or that do not: (passage, start, end)."""
    found: list[Spot] = []
    for i in numbers:
        tree = split(texts[i])
        spans = [(tree.segments[k].start, tree.segments[k].end) for k in tree.at("sentence")]
        found += [(i, a, b) for a, b in spans if holds(texts[i][a:b], answer) == holding]
    return found


def _edited(texts: Mapping[int, str], spots: Sequence[Spot], how: Callable[[str], str]) -> dict[int, str]:
    """The passages with these sentences changed; a sentence that becomes empty takes the space after it along."""
    new: dict[int, str] = {}
    for i, a, b in sorted(spots, reverse=True):
        text = new.get(i, texts[i])
        said = how(text[a:b])
        new[i] = text[:a] + said + (text[b:] if said else text[b:].lstrip())
    return new
