"""Which layers would change the picture if they alone read another prompt?

Causal tracing puts clean activations back; its direct cross-check (Basu et al., LocoGen, 2024) needs no corruption and
keeps no activations. Of the M cross-attention layers a window of m neighbours, from layer j on, reads another prompt
c' (the attribute's word replaced) at all steps; the others read c:

    k_l = W_K^l c',  v_l = W_V^l c'   for l in j..j+m-1,      k_l = W_K^l c,  v_l = W_V^l c   elsewhere

at the same seed. The window whose picture loses the attribute owns it. The direct effect of window j is

    DE_j = readout(all layers read c) - readout(window j reads c'),  mean over seeds.

With m = 1 the windows are layers and can be ranked beside the indirect effects of `causal_trace`.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MethodError
from ..explanation import Cost, Explanation
from ..method import Card
from ..units import Units
from ..verdict import LOOK_ALPHA, t_interval
from ..worlds.shapes.tracing import readout as oracle_readout

if TYPE_CHECKING:
    from ..engine.patch import Readout
    from ..engine.progress import Advance
    from ..run import Run

CARD = Card(
    name="prompt_window",
    verb="PromptWindow",
    paper="Basu, Rezaei, Kattakinda, Rossi, Zhao, Morariu, Manjunatha and Feizi, On Mechanistic Knowledge Localization "
    "in Text-to-Image Generative Models, ICML 2024",
    systems=(),
    question="Which layers would change the picture if they alone read another prompt?",
    units=("window of cross-attention layers",),
    works_on=("Stable Diffusion 1 and 2", "SDXL", "PixArt"),
    needs=("cross-attention",),
    cost="one model run for each window and seed, and one for each seed",
    claim="On prompts and seeds that it was not found on, the first-ranked cross-attention layer takes a colour word's "
    "colour away when it alone reads the prompt with another colour; random layers do not.",
    falsifier={
        "trial": "shapes.tracing.measure_window",
        "planted": "the oracle reads the colour of what was drawn; one layer reads the prompt with another colour word",
        "expect": 0.5,
        "control": "two random layers, the one with most parameters, the first and the last",
        "seconds": 60,
    },
    departs="The readout is an oracle or any function of the run, where the paper judges by CLIPScore and by eye; "
    "without one it is the distance of the latents. Where a transformer masks padding (PixArt), the mask stays that of "
    "the run's own prompt. The pooled text of SDXL stays. The equations and the layers' order are from a description "
    "of the method, not from its code. The edit of the window (LocoEdit) is not here.",
    avoid="On models that mix text and picture in one attention (SD3, FLUX): they have no layers that read text alone.",
)


@dataclass(frozen=True)
class PromptWindow:
    """Settings. ``word``: its label in the run; ``other``: what the window reads in its place (empty: the model's first
    alternative); ``width``: layers in a window (m); ``seeds``: how many, from the run's on."""

    word: str = ""
    other: str = ""
    width: int = 3
    seeds: int = 4
    batch: int = 32

    def explain(self, run: Run, readout: Readout | None = None, advance: Advance | None = None) -> Explanation:
        """Scores[window], the direct effects, with their standard errors over seeds as ``spread``. Raises MethodError
        or PromptError before the runs."""
        from ..engine.patch import Row, denoiser_sites, encoded, play
        from ..engine.prompts import replace_word

        began = time.perf_counter()
        model: Any = run.model
        if model is None or "cross-attention" not in model.capabilities:
            found = "a run without its model" if model is None else "no layer that reads the text alone"
            raise MethodError(f"prompt_window of {run.model_name} ({run.family})", found, "causal_trace, on its blocks")
        layers = [s.module for s in denoiser_sites(model, ("cross-attention",))]
        if not 1 <= self.width <= len(layers) or self.seeds < 1:
            asked = f"windows of {self.width} layers on {self.seeds} seeds"
            have = len(layers)
            raise MethodError(asked, f"the model has {have} layers", f"1 to {have} layers, 1 seed or more")
        at = run.words.find(self.word)
        others = (self.other,) if self.other else model.alternatives(run.settings.prompt, at)
        if not others:
            raise MethodError(f"a window that reads {self.word!r} replaced", "no other word is known", "other='blue'")
        windows = [layers[j : j + self.width] for j in range(len(layers) - self.width + 1)]
        many = [replace(run.settings, seed=run.settings.seed + k, images=1) for k in range(self.seeds)]
        c_ = encoded(model, replace_word(run.settings.prompt, at, others[0]), run.settings)
        clean = play(model, [Row(s) for s in many], batch=self.batch, advance=advance)
        rows = [Row(s, feed=dict.fromkeys(w), other=c_) for w in windows for s in many]
        made = play(model, rows, batch=self.batch, advance=advance)
        read = readout or oracle_readout(model, self.word.partition("#")[0], run.settings)
        if read is None:
            norms = [float(np.linalg.norm(c.latents)) for c in clean]
            apart = [float(np.linalg.norm(r.latents - clean[i % len(many)].latents)) for i, r in enumerate(made)]
            gone = [a / norms[i % len(many)] for i, a in enumerate(apart)]
        else:
            before = [float(read(c)) for c in clean]
            gone = [before[i % len(many)] - float(read(r)) for i, r in enumerate(made)]
        effects = np.array(gone, float).reshape(len(windows), len(many))
        names = tuple(w[0] if self.width == 1 else f"{w[0]} and {self.width - 1} after" for w in windows)
        intervals = [t_interval(e, LOOK_ALPHA[1]) for e in effects]
        spread = effects.std(1, ddof=1) / len(many) ** 0.5 if len(many) > 1 else np.zeros(len(windows))
        return Explanation(
            method="prompt_window",
            units=Units("window", names, tuple((tuple(range(j, j + self.width)),) for j in range(len(windows)))),
            scores=effects.mean(1).astype(np.float32),
            axes=("window",),
            readout=str(getattr(read, "name", "") or "relative distance of the latents"),
            kind="direct effect",
            settings=asdict(self) | {"other": others[0]},
            cost=Cost(len(rows) + len(many), time.perf_counter() - began),
            spread=spread.astype(np.float32),
            details={"layers": layers, "windows": windows, "effects": effects.tolist(), "intervals": intervals},
            run=run,
        )
