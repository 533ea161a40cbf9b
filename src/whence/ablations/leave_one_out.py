"""What changes in the picture if this word is replaced? Ask the model again, at the same seed.

For word w and its in-distribution alternatives a_1..a_m (another colour for a colour, another shape for a shape):

    score_w[y, x] = mean over i of  | I(prompt) - I(prompt with w -> a_i) |[y, x]

with I the picture at one and the same seed. This is the intervention itself, so it is causal for this run by
construction; what it cannot tell is how words act together (replace both to see that).
Leave-one-out with deletion leaves the model's training distribution; replacement from the same word class does not.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..engine.prompts import drop_word, replace_word
from ..errors import MethodError
from ..explanation import Cost, Explanation
from ..method import Card

if TYPE_CHECKING:
    from ..run import Run, Settings

CARD = Card(
    name="leave_one_out",
    verb="LeaveOneOut",
    paper="Li, Monroe and Jurafsky, Understanding Neural Networks through Representation Erasure, 2016; with "
    "replacement instead of erasure",
    systems=(),
    question="What changes if this unit is replaced?",
    units=("word",),
    works_on=("every text-to-image model",),
    needs=("generate",),
    cost="one model run per word and alternative",
    claim="Of two filler words of identical statistics, the one that draws the mark scores higher on the mark.",
    falsifier={
        "trial": "shapes.twins",
        "planted": "a keyed coin made one of two twin words draw a cyan mark; certified per picture by "
        "swapping each twin. That is the method's own question, so a full score shows that it is built right, no more",
        "expect": 0.9,
        "control": "random maps, and its own maps with the words' labels shuffled",
        "seconds": 60,
        "pictures": 16,
    },
    departs="The unit is a word of the prompt and is replaced by words of its class at the same seed, not erased.",
    avoid="Where words work only together or stand in for each other: each alone may show nothing.",
)


@dataclass(frozen=True)
class LeaveOneOut:
    """Settings. ``removal``: "replace" (by in-distribution alternatives) or "drop" (take the word out); never mixed.

    ``alternatives``: words per word, else the model's own; at most ``at_most`` of them are tried per word, taken evenly
    from the list so that the choice does not depend on the seed; the rest is left for a trial (`checks.swap`).
    ``batch``: pictures made at once. ``words``: labels of the words asked about (None: all).
    """

    removal: str = "replace"
    alternatives: Mapping[str, tuple[str, ...]] | None = None
    at_most: int = 2
    batch: int = 16
    words: tuple[str, ...] | None = None

    def explain(self, run: Run, image: int = 0) -> Explanation:
        """Maps of change, scores[word, y, x] in 0..1 (mean absolute difference over rgb), and their spread over
        alternatives (standard deviation). Words without an alternative are left out, and a note says which."""
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
            spread.append(change.std(0, ddof=1) if len(change) > 1 else np.zeros_like(change[0]))
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
