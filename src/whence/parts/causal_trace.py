"""Which component of the network carries this word into the picture?

Causal tracing (Basu et al. 2024, after Meng et al. 2022) makes three runs of one seed:

    clean       the prompt as it is; the activations a_i(t) of every component i are kept at every denoiser pass t
    corrupted   the word's text embedding is spoilt; the attribute is gone
    restored    corrupted, but component i gives its clean a_i(t) at every t

and the indirect effect of component i is what putting it back alone gives back of the attribute:

    IE_i = readout(restored_i) - readout(corrupted),  mean over seeds

In the denoiser a component is a module (or an attention head); in the text encoder a layer's state at one token. All
pairs of site and seed go through the model in common batches. A site whose restoration brings back the whole picture
(closeness of the latents near 1) is a bottleneck and says nothing of the attribute: closeness stands beside each
effect. The verdict asks the first-ranked site again on fresh seeds, against random sites of equal size.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MethodError, PromptError
from ..explanation import Cost, Explanation
from ..method import Card
from ..units import Units
from ..verdict import LOOK_ALPHA, Verdict, judge, t_interval
from ..worlds.shapes.tracing import readout as oracle_readout

if TYPE_CHECKING:
    from ..engine.journal import Journal
    from ..engine.patch import Bench, Corruption, Group, Readout, Site
    from ..engine.progress import Advance
    from ..run import Run

CARD = Card(
    name="causal_trace",
    verb="CausalTrace",
    paper="Basu, Zhao, Morariu, Feizi and Manjunatha, Localizing and Editing Knowledge in Text-to-Image Generative "
    "Models, ICLR 2024",
    systems=("S003-02",),
    question="Which module, head or token of the network carries this word into the picture?",
    units=("module", "head", "token of a layer"),
    works_on=("Stable Diffusion 1 and 2", "SDXL", "PixArt", "Stable Diffusion 3", "FLUX"),
    needs=("pictures",),
    cost="one model run for each site and seed, and two for each seed; fewer with search='halves'",
    claim="On prompts and seeds that it was not found on, the first-ranked denoiser site alone brings back the colour "
    "of a colour word that was replaced, which random sites, the site with most parameters, the deepest one and that "
    "of the largest activations do not.",
    falsifier={
        "trial": "shapes.tracing.measure",
        "planted": "the oracle reads the colour of what was drawn; the word is replaced by another colour's, so that "
        "the corrupted picture has none of it",
        "expect": 0.5,
        "control": "two random sites, and the sites with most parameters, greatest depth and largest activations",
        "seconds": 120,
    },
    departs="The text is spoilt by replacing the word where an alternative is known (noise leaves colours on a small "
    "model); noise is on offer, in the denoiser also on the places after the word. The readout is an oracle or any "
    "function of the run, not CLIPScore; without one it is closeness of the latents. A resnet is what it adds, not the "
    "stream after it, which at a bottleneck is the whole picture (kinds=('stream',) has that). Only the conditional "
    "rows are put back. A pooled text vector (SDXL, SD3, FLUX) is not spoilt by noise or swap in the denoiser.",
    avoid="To say that a site is the only place: two sites can each be enough, or do something together alone.",
)
BOTTLENECK = 0.9
"""Closeness of the latents from which a site is called a bottleneck."""


@dataclass(frozen=True)
class CausalTrace:
    """Settings. ``word``: its label in the run. ``where``: "denoiser" or "text encoder". ``corruption``: None: swap by
    an alternative that the model names, else noise. ``seeds``: how many, from the run's on. ``kinds`` of modules (see
    ``engine.patch.KINDS``), ``heads``: attentions head by head; ``steps``: denoiser passes (from, up to and without)
    that are put back. ``search``: "all" sites one by one, or "halves". ``budget``: bytes of kept activations."""

    word: str = ""
    where: str = "denoiser"
    corruption: Corruption | None = None
    seeds: int = 4
    kinds: tuple[str, ...] | None = None
    heads: bool = False
    steps: tuple[int, int] | None = None
    search: str = "all"
    floor: float = 0.05
    budget: int = 1024 * 2**20

    def explain(
        self, run: Run, readout: Readout | None = None, advance: Advance | None = None, journal: Journal | None = None
    ) -> Explanation:
        """Scores[site], the indirect effects, with their standard errors over seeds as ``spread``.

        ``details``: each site's effects, interval, closeness, kind and parameters; the total effect; pictures against
        those of asking one by one. Raises MethodError, PromptError or RunError before the runs.
        """
        if self.search not in ("all", "halves"):
            raise MethodError(f"search {self.search!r}", "no such search", "'all' or 'halves'")
        began = time.perf_counter()
        return self.found(self.bench(run, 0, self.seeds, readout, advance, journal), run, began)

    def found(self, bench: Bench, run: Run, began: float) -> Explanation:
        """The answer of :meth:`explain` on a bench; ``bench.shown`` then has the first seed's pictures."""
        from ..engine.patch import by_halves, one_by_one

        sites = bench.sites
        halves = self.search == "halves"
        found = by_halves(bench.measure, sites, self.floor) if halves else one_by_one(bench.measure, sites)
        mean, n = found.effects.mean(1), len(bench.many)
        spread = found.effects.std(1, ddof=1) / n**0.5 if n > 1 else np.zeros(len(sites))
        near = [bench.near((s,)) if alone else None for s, alone in zip(sites, found.alone, strict=True)]
        rows = [
            {"site": s.label, "kind": s.kind, "parameters": s.parameters, "depth": s.depth, "effect": float(mean[i]),
             "interval": t_interval(found.effects[i], LOOK_ALPHA[1]), "effects": found.effects[i].tolist(),
             "closeness": near[i], "alone": found.alone[i]}
            for i, s in enumerate(sites)
        ]  # fmt: skip
        notes = [
            f"{r['site']} brings back the whole picture: a bottleneck, no place of the word"
            for r in rows
            if r["closeness"] is not None and r["closeness"] > BOTTLENECK
        ]
        return Explanation(
            method="causal_trace",
            units=Units("site", tuple(s.label for s in sites), tuple(((i,),) for i in range(len(sites)))),
            scores=mean.astype(np.float32),
            axes=("site",),
            readout=_named(bench.readout),
            kind="indirect effect",
            settings=asdict(self) | {"corruption": asdict(bench.corruptions[0])},
            cost=Cost(bench.runs, time.perf_counter() - began),
            spread=spread.astype(np.float32),
            notes=tuple(notes),
            details={
                "word": self.word, "sites": rows, "order": found.order, "total": bench.total.tolist(),
                "clean": [a for a, _ in bench.ends], "corrupted": [b for _, b in bench.ends],
                "runs_one_by_one": n * (2 + len(sites)),
            },
            run=run,
        )  # fmt: skip

    def bench(
        self, run: Run, first: int, n: int, readout: Readout | None = None, advance: Advance | None = None,
        journal: Journal | None = None,
    ) -> Bench:  # fmt: skip
        """``n`` seeds from the run's seed + ``first`` on, clean and corrupted."""
        from ..engine.patch import Bench

        model: Any = run.model
        if model is None or not hasattr(model, "denoiser"):
            raise MethodError(f"causal_trace of {run.model_name}", "a run without its model", "load and generate")
        if n < 1:
            raise MethodError(f"{n} seeds", "nothing to trace on", "1 or more")
        if self.word not in run.words.labels:
            raise PromptError(f"trace the word {self.word!r}", "it is not in the prompt", ", ".join(run.words.labels))
        sites = self.sites(model, run.settings.prompt)
        many = [replace(run.settings, seed=run.settings.seed + first + k, images=1) for k in range(n)]
        read = readout or oracle_readout(model, self.word.partition("#")[0], run.settings)
        return Bench(
            model, many, [self.word] * n, [self.corruption_for(run)] * n, sites, read, self.budget,
            journal=journal, advance=advance,
        )  # fmt: skip

    def sites(self, model: Any, prompt: str) -> tuple[Site, ...]:
        """The sites that are asked, in the order in which they run."""
        from ..engine.patch import denoiser_sites, encoder_sites

        if self.where == "denoiser":
            return denoiser_sites(model, self.kinds, self.heads, self.steps)
        if self.where != "text encoder":
            raise MethodError(f"trace the {self.where}", "no such part", "'denoiser' or 'text encoder'")
        if self.heads or self.steps:
            raise MethodError("heads or steps of the text encoder", "it has layers and tokens", "heads=False, no steps")
        return encoder_sites(model, prompt, self.kinds or ("self-attention", "feed-forward"))

    def corruption_for(self, run: Run) -> Corruption:
        """What is done to the text of this run."""
        from ..engine.patch import Corruption

        if self.corruption is not None:
            return self.corruption
        model: Any = run.model
        others = model.alternatives(run.settings.prompt, run.words.find(self.word))
        return Corruption("swap", other=others[0]) if others else Corruption()

    def judge(
        self, run: Run, found: Explanation, seeds: int = 8, readout: Readout | None = None, draws: int = 3,
        delta: float = 0.2, advance: Advance | None = None, journal: Journal | None = None,
    ) -> Verdict:  # fmt: skip
        """The verdict on *runs like this*: the first-ranked site that is no bottleneck, on ``seeds`` fresh seeds,
        against ``draws`` random sites. Its control is their mean at the same seed."""
        from ..engine.patch import against_random

        rows = found.details["sites"]
        order = [i for i in found.details["order"] if (rows[i]["closeness"] or 0) <= BOTTLENECK]
        at = (order or found.details["order"])[0]
        bench = self.bench(run, self.seeds, seeds, readout, advance, journal)
        top: Group = (bench.sites[at],)
        values, random, others = against_random(bench, top, draws, "judge", self.word)
        return judge(
            values.tolist(), {"random sites": random.tolist()}, claim=f"{top[0].label} carries “{self.word}”",
            delta=delta, readout=_named(bench.readout), unit="indirect effect", alpha=LOOK_ALPHA[1],
            evidence=f"first of {len(rows)} sites on {self.seeds} other seeds, effect {rows[at]['effect']:.3g}; the "
            f"corruption takes {float(bench.total.mean()):.3g} here",
            intervention=f"{bench.corruptions[0].how} of the word, then the clean activation of this site alone; "
            f"control: {', '.join(g[0].label for g in others)}",
            closeness=bench.near(top), runs=bench.runs, site=top[0].label, total=bench.total.tolist(),
        )  # fmt: skip


def _named(readout: Readout | None) -> str:
    return str(getattr(readout, "name", None) or getattr(readout, "__name__", "")) or "closeness of the latents"
