"""Change one concept where the text encoder holds it, in less than a second.

Tracing finds one causal state in the CLIP text encoder: the first self-attention at the last token of the subject (Basu
et al. 2024, section 4). Diff-QuickFix rewrites the output projection W of that layer (section 5): keys k_i are what
goes into W at the last subject token of prompts with the old concept, values v_i what W gives at the matching token of
prompts with the new one, and

    W* = argmin  sum_i |W k_i - v_i|^2 + lam |W - W_0|^2                                                     (eq. 6)
       = (lam W_0 + sum_i v_i k_i^T)(lam I + sum_i k_i k_i^T)^-1                                             (eq. 7)

Nothing is trained. With a keep set the values of prompts with other concepts enter as they are; the solver is in
engine/weights.py, and says what it will reach before anything changes.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from ..change import Change, Goal
from ..errors import ModelError
from ..method import Card
from ..worlds.shapes.editing import examples

CARD = Card(
    name="diff_quickfix",
    verb="DiffQuickFix",
    paper="Basu, Zhao, Morariu, Feizi and Manjunatha, Localizing and Editing Knowledge in Text-to-Image Generative "
    "Models, ICLR 2024",
    systems=("S003-02",),
    question="Where in the text encoder is this concept, and what if it said another one there?",
    units=("matrix",),
    works_on=("Stable Diffusion 1 and 2", "SDXL"),
    needs=("clip-text-encoder",),
    cost="no picture: prompts are read by the text encoder, one linear system is solved; well below a second",
    claim="One matrix of the text encoder's first self-attention makes prompts with one colour draw another, and other "
    "colours stay; the same change at another place of the model does not.",
    falsifier={
        "trial": "shapes.editing.measure",
        "planted": "prompts with the old colour must draw the new one at the same seed; prompts without it must stay",
        "expect": 0.8,
        "control": "the same solve at a random matrix of the encoder, the same delta at a random one of the model",
        "seconds": 120,
    },
    departs="A keep set, without which other colours move on the embedded model (the paper has none: keep=0). Prompts "
    "are captions of the model's own world where it has one, else the paper's four templates. tokens='later', the end "
    "and padding positions too, as the release does; 'last' is the paper's text. Equation numbers are from memory.",
    avoid="For a concept that its word does not carry: what a model draws unasked (a style of its own) stays. Prompts "
    "that show the concept by other words stay too, which the report's paraphrases measure.",
)


@dataclass(frozen=True)
class DiffQuickFix:
    """Settings. ``site``: the edited layer's place in each CLIP text encoder; ``lam``: the paper's .01; ``tokens``:
    "last" or "later", see ``engine.rewording.aligned``; ``keep``: at most so many prompts whose values stay (0: none);
    ``keep_weight``: of a kept value against an edited one; ``wanted``: the share of the way that may be left to go."""

    site: str = "layers.0.self_attn.out_proj"
    lam: float = 0.01
    tokens: str = "later"
    keep: int = 160
    keep_weight: float = 1.0
    wanted: float = 0.4

    def plan(self, model: Any, goal: Goal | str) -> Change:
        """The change of ``"old -> new"`` for this model; nothing is touched. Raises PromptError for a phrase that the
        model or the prompts do not have, ModelError for a layer that is not there or cannot be edited, MethodError
        where what is to be kept stands against it."""
        import torch

        from ..engine.rewording import aligned, kept, pairs
        from ..engine.weights import least_squares, recorded, refuse_conflict

        began, goal = time.perf_counter(), Goal.of(goal)
        said = pairs(model, goal, examples(model, goal.old))
        stays = kept(model, goal, said, self.keep)
        edited = self._matrices(model)
        reads = []
        for prompts in ([p.old for p in said], [p.new for p in said], list(stays)):
            with recorded(edited) as seen, torch.no_grad():
                if prompts:
                    model.encode(prompts, "", False)
            reads.append(seen)
        old, new, rest = reads
        before, after, foreseen = {}, {}, []
        for number, m in enumerate(edited):
            keys, values = [], []
            for i, pair in enumerate(said):
                a, b = ([own[number] for own in model.words(p).members] for p in (pair.old, pair.new))
                for s, t in aligned(pair, a, b, old[m.name][0].shape[1], self.tokens):
                    keys.append(old[m.name][0][i, s])
                    values.append(new[m.name][1][i, t])
            k = torch.stack(keys)
            stay = rest[m.name][0].flatten(0, 1) if stays else None
            wanted = torch.stack(values) - m.added(k)
            solved, told = least_squares([m], k, [wanted], self.lam, stay, keep_weight=self.keep_weight)
            before[m.name], after[m.name] = m.weight.detach().clone(), solved[0]
            foreseen += told
        refuse_conflict(foreseen, self.wanted, f"the change {goal}")
        return Change(
            "diff_quickfix", goal, asdict(self) | {"prompts": len(said), "kept": len(stays)}, model.name,
            model.fingerprint, before, after, tuple(map(asdict, foreseen)), time.perf_counter() - began,
        )  # fmt: skip

    def _matrices(self, model: Any) -> list[Any]:
        """The site in each CLIP text encoder of the pipeline."""
        from ..engine.weights import matrix

        found = []
        for component in ("text_encoder", "text_encoder_2"):
            module = getattr(model.pipeline, component, None)
            if module is None or "CLIP" not in type(getattr(module, "_orig_mod", module)).__name__:
                continue
            inner = getattr(module, "_orig_mod", module)
            places = [n for n, _ in inner.named_modules() if n.endswith(self.site) and ".base_layer" not in n]
            found.append(matrix(component, module, places[0] if places else self.site))
        if not found or len(found) < len(model.encoders()):
            raise ModelError(
                f"diff_quickfix on {model.name}", f"a {model.family} has a text encoder that is not CLIP's",
                "Stable Diffusion 1 or 2, SDXL",
            )  # fmt: skip
        return found
