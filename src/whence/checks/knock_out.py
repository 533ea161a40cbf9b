"""Did the model read its answer in this passage, or did it know it by heart? Take the evidence out.

A passage that holds the answer is not where the answer came from if the model would have said the same without it. And
one passage knocked out shows nothing while another one says the same. So all passages that hold the answer are changed
together, in three ways, and the model writes anew:

* *edit*: in all of them the answer is replaced by another value, again and again. A reader follows; one that answers by
  heart stays. The one primary number is the share of edits that the answer follows.
* *take out*: all of them are cut. Does the answer stay?
* *hide*: they stand where they stood, and no token may attend to them. By how much does the answer's log-probability
  fall? (Places are not numbered anew, so that nothing else moves.)

*This run*: the replicates are the other values. Control: the same edits made in passages that do not hold the answer
(their own last word becomes the other value): an answer that follows those follows anything.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..answers import holds, put
from ..errors import MethodError, PromptError
from ..method import Card
from ..verdict import THIS_RUN, Verdict, judge_run, unmeasured

if TYPE_CHECKING:
    from ..text import TextRun

CARD = Card(
    name="knock_out",
    verb="knock_out",
    paper="Longpre et al., Entity-Based Knowledge Conflicts in Question Answering, 2021 (the edits); joint removal and "
    "the verdict are Whence's own",
    systems=(),
    question="Was the answer read in the passages that hold it, or known by heart?",
    units=("passage", "sentence"),
    works_on=("causal and encoder-decoder language models",),
    needs=("text", "generate"),
    cost="two texts for each other value, one more, and one pass",
    claim="Answers that are read are supported; answers known by heart are caught, although a passage holds them.",
    falsifier={
        "trial": "tests/checks/test_knock_out.py::test_an_answer_by_heart_is_caught_and_one_that_was_read_is_not",
        "planted": "one model: who is where stands in its prompt alone, where people were born it has learned by heart",
        "expect": 0.9,
        "control": "the passages' holding the answer, which is the same in both",
        "seconds": 30,
    },
    departs="The paper substitutes named entities that a tagger finds; here the other values are given.",
    avoid="Where the answer is no piece of a passage (a sum, a yes): nothing holds it, and the check says so.",
)

MOST = 0.5
"""The smallest share of followed edits worth having."""


@dataclass(frozen=True)
class Grounding:
    """What came of it.

    ``verdict``: on "the answer was read in these passages". ``holding``: numbers of the units that hold it.
    ``follows``, ``stays``: shares of the edits after which the model writes the other value, or the old answer all the
    same; ``texts``: what was written after each. ``without``: what it writes with all holding passages cut; ``abides``:
    that still holds the answer. ``hidden``: fall of the answer's log-probability, nats, with them hidden from attention
    (None: this model's attention cannot be scaled)."""

    verdict: Verdict
    holding: tuple[int, ...]
    follows: float = 0.0
    stays: float = 0.0
    without: str = ""
    abides: bool = False
    hidden: float | None = None
    texts: tuple[str, ...] = ()

    @property
    def word(self) -> str:
        """Where the answer came from: "read", "by heart", "neither" (it goes when the evidence changes, to nothing that
        the evidence says), or "nothing holds it"."""
        if not self.holding:
            return "nothing holds it"
        if self.follows > MOST:
            return "read"
        return "by heart" if self.stays > MOST else "neither"


def knock_out(question: Any, answer: str, others: Sequence[str]) -> Grounding:
    """``question``: a TextQuestion whose units are passages or sentences; ``answer``: the piece of the output that is
    in doubt; ``others``: values that could stand in its place, three or more that no passage holds.

    Raises PromptError where the answer is not in the output, MethodError for values that cannot be told from it.
    """
    run: TextRun = question.run
    if not holds(run.text, answer):
        raise PromptError(f"the answer {answer!r}", f"the model wrote {run.text!r}", "a piece of the output")
    names = question.units.names
    values = tuple(dict.fromkeys(v for v in others if not holds(run.prompt, v) and not holds(v, answer)))
    if len(values) < 3:
        raise MethodError(
            f"the check knock_out with {len(others)} other values", f"{len(values)} that stand nowhere in the prompt",
            "three or more values that could be the answer and are not said",
        )  # fmt: skip
    claim = f"{answer!r} was read in the passages that hold it"
    holding = tuple(i for i, name in enumerate(names) if holds(name, answer))
    if not holding:
        return Grounding(unmeasured(claim, THIS_RUN, "no passage holds the answer", MOST), ())
    texts = [_write(run, question, {i: put(names[i], answer, v) for i in holding}) for v in values]
    idle = [i for i in range(len(names)) if i not in holding]
    controls: dict[str, list[float]] = {}
    if idle:
        edited = [
            _write(run, question, {i: end_with(names[i], v) for i in idle[k % len(idle) :][: len(holding)]})
            for k, v in enumerate(values)
        ]
        controls["the same edits elsewhere"] = [float(holds(t, v)) for t, v in zip(edited, values, strict=True)]
    follows = [float(holds(t, v)) for t, v in zip(texts, values, strict=True)]
    stays = [float(holds(t, answer)) for t in texts]
    verdict = judge_run(
        follows, controls, claim=claim, delta=MOST, readout="share of edits that the answer follows", unit="0..1",
        tried_all=len(values) == len(others),
        evidence=f"{len(holding)} of {len(names)} {question.units.kind}s hold it",
        intervention=f"{answer!r} replaced in all of them by {', '.join(map(repr, values))}",
        stays=float(np.mean(stays)),
    )  # fmt: skip
    keep = np.array([i not in holding for i in range(len(names))])
    prompt = question.text(keep)
    without = run.again(prompt=prompt, template=False, forced="").text if prompt.strip() else ""
    return Grounding(
        verdict, holding, float(np.mean(follows)), float(np.mean(stays)), without, holds(without, answer),
        _hidden(question, answer, keep), tuple(texts),
    )  # fmt: skip


def _write(run: TextRun, question: Any, new: dict[int, str]) -> str:
    return str(run.again(prompt=question.reworded(new), template=False, forced="").text)


def _hidden(question: Any, answer: str, keep: Any) -> float | None:
    """Fall of the answer's log-probability with the passages hidden from attention."""
    if "suppression" not in question.capabilities:
        return None
    tokens = question.run.tokens_of(answer) if question.run.text.count(answer) == 1 else question.tokens
    about = question.over(tokens.start - question.tokens.start, tokens.stop - question.tokens.start)
    seen, hidden = about.suppress(np.stack([np.ones(len(keep)), np.where(keep, 1.0, 1e-6)]), "bias").sum(1)
    return float(seen - hidden)


def end_with(text: str, value: str) -> str:
    """The text with its last word replaced: an edit that says another value, and not of what is asked."""
    return re.sub(r"\w+(?=\W*$)", lambda _: value, text, count=1)
