"""What changes in the picture if this word is replaced? Ask the model again, at the same seed.

For word w and its in-distribution alternatives a_1..a_m (another colour for a colour, another shape for a shape):

    score_w[y, x] = mean over i of  | I(prompt) - I(prompt with w -> a_i) |[y, x]

with I the picture at one and the same seed. Of any Question, with f its readout, unit u scores what is lost when it
alone is drawn anew from the world's own conditional:

    score_u = f(all kept) - mean over draws of f(u drawn anew)

This is the intervention itself, so it is causal for this run by construction; what it cannot tell is how words act
together (replace both to see that).
Leave-one-out with deletion leaves the model's training distribution; replacement from the same word class does not.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..engine.attribution import explanation_of, mean_and_error, require
from ..engine.prompts import drop_word, replace_word
from ..errors import MethodError
from ..explanation import Cost, Explanation
from ..method import Card
from ..run import Run

if TYPE_CHECKING:
    from ..question import Question
    from ..run import Settings

CARD = Card(
    name="leave_one_out",
    verb="LeaveOneOut",
    paper="Li, Monroe and Jurafsky, Understanding Neural Networks through Representation Erasure, 2016; with "
    "replacement instead of erasure",
    systems=(),
    question="What changes if this unit is replaced?",
    units=("word", "any unit"),
    works_on=("every text-to-image model", "every model that answers a Question"),
    needs=("generate, or ask",),
    cost="one model run per word and alternative; of a Question, one per unit and draw: 385 for 24 units",
    claim="Of two units of identical statistics, the one that decides the outcome scores higher.",
    falsifier={
        "trial": "twins.single",
        "planted": "a keyed coin made one of two identical arms decide; certified by swaps on the model itself",
        "expect": 0.9,
        "control": "random scores, its own scores shuffled, and scorers that never ask the model",
        "seconds": 5,
    },
    departs="The unit is a word of the prompt and is replaced by words of its class at the same seed, not erased.",
    avoid="Where words work only together or stand in for each other: each alone may show nothing.",
)


@dataclass(frozen=True)
class LeaveOneOut:
    """Settings. ``removal``: "replace" (by in-distribution alternatives) or "drop" (take the word out); never mixed.

    ``alternatives``: words per word, else the model's own; at most ``at_most`` of them are tried per word, taken evenly
    from the list so that the choice does not depend on the seed; the rest is left for a trial (`checks.swap`).
    ``batch``: pictures made at once. ``words``: labels of the words asked about (None: all). ``draws``: of a Question,
    how often each unit is drawn anew.
    """

    removal: str = "replace"
    alternatives: Mapping[str, tuple[str, ...]] | None = None
    at_most: int = 2
    batch: int = 16
    words: tuple[str, ...] | None = None
    draws: int = 16

    def rows(self, units: int) -> int:
        """Rows sent forwards for a Question of so many units."""
        return 1 + self.draws * units

    def explain(self, run: Run | Question, image: int = 0) -> Explanation:
        """Of a run: maps of change, scores[word, y, x] in 0..1 (mean absolute difference over rgb), and their spread
        over alternatives (standard error; 0 where there is one alternative only). Words without an alternative are
        left out, and a note says which.

        Of a Question: scores[unit] in the readout's units, above 0 where the unit made the output happen, and their
        spread over draws (standard error).
        """
        if not isinstance(run, Run):
            return self._of_question(run)
        began = time.perf_counter()
        if self.removal not in ("replace", "drop"):
            raise MethodError(f"removal {self.removal!r}", "no such removal", "'replace' or 'drop'")
        if run.model is None:
            raise MethodError("leave_one_out", "a run without its model", "load the model and generate")
        prompts = [self._prompts(run, i) for i in range(len(run.words))]
        asked = range(len(run.words)) if self.words is None else [run.words.find(w) for w in self.words]
        tried = [i for i in asked if prompts[i]]
        if not tried:
            raise MethodError(
                f"leave_one_out by replacement in {run.settings.prompt!r}",
                f"{run.model_name} names no alternatives for any of its words",
                "alternatives={'red': ('blue', 'green')}, or removal='drop'",
            )
        settings = [replace(run.settings, prompt=p) for i in tried for p in prompts[i]]
        pictures = iter(_pictures(run, settings, image, self.batch))
        original = run.images[image].astype(np.float32)
        scores, spread = [], []
        for i in tried:
            change = np.stack([abs(next(pictures).astype(np.float32) - original).mean(-1) / 255 for _ in prompts[i]])
            scores.append(change.mean(0))
            spread.append(change.std(0, ddof=1) / len(change) ** 0.5 if len(change) > 1 else np.zeros_like(change[0]))
        left_out = [run.words.labels[i] for i in asked if i not in tried]
        note = f"no in-distribution alternative, so nothing is said of: {', '.join(left_out)}"
        return Explanation(
            method="leave_one_out",
            units=run.words.subset(tried),
            scores=np.stack(scores),
            axes=("word", "y", "x"),
            readout="change of the picture, mean absolute difference over rgb, 0..1",
            kind="causal",
            settings={"removal": self.removal, "at_most": self.at_most, "image": image},
            cost=Cost(len(settings) * run.settings.images, time.perf_counter() - began),
            spread=np.stack(spread),
            notes=(note,) if left_out else (),
            details={"prompts": {run.words.labels[i]: list(prompts[i]) for i in tried}},
            run=run,
        )

    def _of_question(self, question: Question) -> Explanation:
        began = time.perf_counter()
        require(question, "leave_one_out")
        n = len(question.units)
        draws = 1 if "deterministic" in question.capabilities else self.draws
        keep = np.concatenate([np.ones((1, n), bool), np.repeat(~np.eye(n, dtype=bool), draws, 0)])
        values = np.asarray(question.ask(keep), np.float64)
        scores, spread = mean_and_error(list((values[0] - values[1:].reshape(n, draws)).T))
        return explanation_of(question, "leave_one_out", self, scores, began, len(keep), spread)

    def _prompts(self, run: Run, word: int) -> tuple[str, ...]:
        prompt = run.settings.prompt
        if self.removal == "drop":
            return (drop_word(prompt, word),)
        assert run.model is not None
        if self.alternatives is not None:
            others = tuple(self.alternatives.get(run.words.names[word], ()))
        else:
            others = run.model.alternatives(prompt, word)
        n = min(self.at_most, len(others))
        chosen = [others[i * len(others) // n] for i in range(n)]
        return tuple(replace_word(prompt, word, other) for other in chosen)


def _pictures(run: Run, settings: list[Settings], image: int, batch: int) -> list[np.ndarray]:
    assert run.model is not None
    many = getattr(run.model, "generate_many", None)
    if many is None:
        return [run.model.generate(s).images[image] for s in settings]
    return [r.images[image] for i in range(0, len(settings), batch) for r in many(settings[i : i + batch])]
