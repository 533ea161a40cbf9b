"""Which attention heads draw which kind of word?

Head relevance vectors (Park et al. 2025) hold, for a visual concept, one number for each cross-attention head; heads
that matter for the concept are then strengthened or weakened. There the number is how often a head attends most to the
concept's words. Here it is causal, by pictures: for a word w and its replacement w', a random half S of all heads reads
the prompt c' with w' in the place of w (keys and values go a share `amount` of the way from c to c'), and

    y(S) = readout(w, heads in S read c')  =  b_0 - sum over h in S of r_h + error

is solved for the relevance r_h by ridge least squares over many S. All heads are asked in every picture, so a word that
several heads draw together is credited to all of them, and a head that alone suffices gets all. A kind of word (colour,
shape, ...) is a set of prompts; its vector is the mean over them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MethodError, PromptError
from ..explanation import Cost, Explanation
from ..method import Card
from ..units import Units
from ..worlds.shapes.tracing import readout as oracle_readout

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..engine.patch import Readout, Row, Site
    from ..engine.progress import Advance
    from ..run import Run, Settings

CARD = Card(
    name="head_relevance",
    verb="HeadRelevance",
    paper="Park, Ko, Byun, Suh and Rhee, Cross-Attention Head Position Patterns Can Align with Human Visual Concepts "
    "in Text-to-Image Generative Models, ICLR 2025",
    systems=(),
    question="Which attention heads draw which kind of word?",
    units=("head",),
    works_on=("Stable Diffusion 1 and 2", "SDXL", "PixArt"),
    needs=("cross-attention",),
    cost="one model run for each subset of heads and prompt: two or three times as many subsets as heads",
    claim="On prompts and seeds that they were not found on, the two most relevant heads for colour take a colour "
    "word's colour away when they read the prompt with another colour; two random heads do not.",
    falsifier={
        "trial": "shapes.tracing.measure_heads",
        "planted": "the oracle reads the colour of what was drawn; two of all heads read another colour word",
        "expect": 0.5,
        "control": "random pairs of heads, the first two, and the two with most parameters",
        "seconds": 100,
    },
    departs="The paper's relevance counts where heads attend; ours is what they do to the picture, by random halves of "
    "the heads and least squares. Weakening swaps the word in a head, and below 0 strengthens it by leading away from "
    "the swap; the paper rescales the attention map. Its 34 concepts and its use in editing are not here. The "
    "paper is known to us from its abstract and from descriptions.",
    avoid="With fewer subsets than heads, or a readout that only all heads together move: relevance is then spread "
    "thin. Its sum over heads is what linear credit can say, not a count of places.",
)


@dataclass(frozen=True)
class HeadRelevance:
    """Settings. ``word``: its label in the run. ``other``: its replacement (empty: the model's first alternative).
    ``subsets``: random halves of the heads for each prompt; ``ridge``: of the least squares, in subsets; ``amount``:
    how far keys and values go to the other word's (1: swapped; -1 leads as far away: strengthened)."""

    word: str = ""
    other: str = ""
    subsets: int = 64
    ridge: float = 1.0
    amount: float = 1.0
    seed: int = 0
    batch: int = 32

    def explain(self, run: Run, readout: Readout | None = None, advance: Advance | None = None) -> Explanation:
        """Scores[head] for one word of one run. ``details["daam_heads"]``: the heads with relevance of half the
        largest or more, as ``DAAM(heads=...)`` takes them. Raises MethodError or PromptError before the runs."""
        if self.word not in run.words.labels:
            raise PromptError(f"heads of {self.word!r}", "it is not in the prompt", ", ".join(run.words.labels))
        model: Any = run.model
        if model is None:
            raise MethodError("head_relevance", "a run without its model", "load the model and generate")
        at = run.words.find(self.word)
        others = (self.other,) if self.other else model.alternatives(run.settings.prompt, at)
        if not others:
            raise MethodError(f"heads that read {self.word!r} replaced", "no other word is known", "other='blue'")
        asked = {"word": [(run.settings, self.word, others[0])]}
        read = readout or oracle_readout(model, self.word.partition("#")[0], run.settings)
        if read is None:
            asked_for = f"heads of {self.word!r}"
            raise MethodError(asked_for, "nothing reads it from the picture", "readout=a function of a Run")
        return self.by_kind(model, asked, {"word": read}, advance, run)

    def by_kind(
        self, model: Any, asked: Mapping[str, Sequence[tuple[Settings, str, str]]], readouts: Mapping[str, Readout],
        advance: Advance | None = None, run: Run | None = None,
    ) -> Explanation:  # fmt: skip
        """Scores[head, kind]: the mean over each kind's (settings, word, other word), read by its readout."""
        from ..engine.patch import denoiser_sites

        began = time.perf_counter()
        if self.subsets < 4 or not any(asked.values()):
            raise MethodError(f"{self.subsets} subsets of heads", "too few, or no prompt", "4 or more, and a prompt")
        if "cross-attention" not in model.capabilities:
            why = f"{model.family} has no attention to the text alone"
            raise MethodError("head_relevance", why, "causal_trace, on its blocks")
        heads = denoiser_sites(model, ("cross-attention",), heads=True)
        vectors, fits, runs = [], {}, 0
        for kind, prompts in asked.items():
            found = [self._vector(model, heads, a, readouts[kind], (kind, i), advance) for i, a in enumerate(prompts)]
            vectors.append(np.mean([r for r, _ in found], axis=0))
            fits[kind] = [round(fit, 3) for _, fit in found]
            runs += self.subsets * len(prompts)
        scores = np.stack(vectors, 1)
        kinds = tuple(asked)
        return Explanation(
            method="head_relevance",
            units=Units("head", tuple(h.label for h in heads), tuple(((i,),) for i in range(len(heads)))),
            scores=scores.astype(np.float32),
            axes=("head", "kind"),
            readout=", ".join(kinds),
            kind="relevance of heads",
            settings=asdict(self) | {"kinds": list(kinds)},
            cost=Cost(runs, time.perf_counter() - began),
            details={
                "weights": {k: dict(zip((h.label for h in heads), v.tolist(), strict=True))
                            for k, v in zip(kinds, vectors, strict=True)},
                "daam_heads": {k: _chosen(heads, v) for k, v in zip(kinds, vectors, strict=True)},
                "explained": fits,
            },
            run=run,
        )  # fmt: skip

    def _vector(
        self, model: Any, heads: Sequence[Site], asked: tuple[Settings, str, str], readout: Readout,
        names: tuple[object, ...], advance: Advance | None,
    ) -> tuple[NDArray[np.float64], float]:  # fmt: skip
        """Relevance[head] by least squares, and the share of variance that it explains."""
        from ..engine.patch import encoded, play
        from ..engine.prompts import replace_word
        from ..engine.randomness import stream

        settings, word, other = asked
        prompt = replace_word(settings.prompt, model.words(settings.prompt).find(word), other)
        c_ = encoded(model, prompt, settings)
        rng = stream("head_relevance", self.seed, *names)
        n, half = len(heads), self.subsets // 2
        chosen = rng.permuted(np.tile(np.arange(n) < n // 2, (half, 1)), axis=1)
        chosen = np.concatenate([chosen, ~chosen])  # a half and the other half: each head is in as many as not
        rows = [feeding(settings, [heads[i] for i in row.nonzero()[0]], c_, self.amount) for row in chosen]
        y = np.array([readout(r) for r in play(model, rows, batch=self.batch, advance=advance)], float)
        x, gone = chosen - chosen.mean(0), y.mean() - y
        r = np.linalg.solve(x.T @ x + self.ridge * np.eye(n), x.T @ gone)
        variance = float((gone**2).sum())
        return r, 1 - float(((gone - x @ r) ** 2).sum()) / variance if variance else 0.0


def feeding(settings: Settings, heads: Sequence[Site], other: Any, amount: float = 1.0) -> Row:
    """A picture whose chosen heads read another text, [token, feature]; the others read their own."""
    from ..engine.patch import Row

    feed: dict[str, list[int]] = {}
    for h in heads:
        feed.setdefault(h.module, []).append(h.head or 0)
    return Row(settings, feed=feed, other=other, amount=amount)


def _chosen(heads: Sequence[Site], relevance: NDArray[np.float64]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for h, r in zip(heads, relevance, strict=True):
        if r >= relevance.max() / 2 > 0:
            found.setdefault(h.module, []).append(h.head or 0)
    return found
