"""Change what the picture reads of a concept: all keys and values of the attention over text, in closed form.

UCE (Gandikota et al. 2024, section 4) takes the embedding c_i of a concept's last token and sets what each of the
cross-attention's matrices W makes of it: v_i* = W_0 c_i* for the words that shall stand in its place. Concepts to keep,
c_j, enter beside:

    W* = argmin  sum_i |W c_i - v_i*|^2 + sum_j |W c_j - W_0 c_j|^2 + lam |W - W_0|^2                        (eq. 6)
       = (lam W_0 + sum_i v_i* c_i^T + sum_j W_0 c_j c_j^T)(lam I + sum_i c_i c_i^T + sum_j c_j c_j^T)^-1    (eq. 7)

All matrices read the same text, so that one factorisation serves them all (engine/weights.py).
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from ..change import Change, Goal
from ..method import Card
from ..worlds.shapes.editing import examples

CARD = Card(
    name="uce",
    verb="UCE",
    paper="Gandikota, Orgad, Belinkov, Materzynska and Bau, Unified Concept Editing in Diffusion Models, WACV 2024",
    systems=(),
    question="What if the picture read another concept wherever it attends to this one?",
    units=("matrix",),
    works_on=("Stable Diffusion 1 and 2", "SDXL"),
    needs=("cross-attention",),
    cost="no picture: prompts are read by the text encoder, one linear system is solved for all matrices",
    claim="New keys and values of the attention over text make prompts with one colour draw another, and other colours "
    "stay; the same deltas at other matrices of the model do not.",
    falsifier={
        "trial": "shapes.editing.measure",
        "planted": "prompts with the old colour must draw the new one at the same seed; prompts without it must stay",
        "expect": 0.8,
        "control": "the same deltas moved to other matrices of the model",
        "seconds": 120,
    },
    departs="tokens='later': the concept's last token and all after it, since the embedded model's nouns and end token "
    "carry the colour too; 'last' is the paper's. Many prompts of the model's own world in the place of one bare name. "
    "Debiasing by alternating targets is not here. Equation numbers are from memory.",
    avoid="For a trait that other words' states carry as well: with tokens='last' the picture still reads it there.",
)


@dataclass(frozen=True)
class UCE:
    """Settings. ``lam``: .5, as the authors' scripts; ``edit_weight`` and ``keep_weight``: a and b of the two sums;
    ``tokens``: "last" or "later"; ``keep``: at most so many prompts that stay; ``wanted``: as in DiffQuickFix."""

    lam: float = 0.5
    edit_weight: float = 1.0
    keep_weight: float = 1.0
    tokens: str = "later"
    keep: int = 160
    wanted: float = 0.4

    def plan(self, model: Any, goal: Goal | str) -> Change:
        """The change of ``"old -> new"`` for this model; nothing is touched. Raises PromptError, ModelError,
        MethodError, as `DiffQuickFix.plan`."""
        import torch

        from ..engine.rewording import aligned, kept, pairs
        from ..engine.weights import cross_attention, least_squares, refuse_conflict

        def columns(prompt: str) -> Any:
            return model.columns(model.words(prompt))

        began, goal = time.perf_counter(), Goal.of(goal)
        said = pairs(model, goal, examples(model, goal.old))
        stays = kept(model, goal, said, self.keep)
        edited = cross_attention(model)
        with torch.no_grad():
            old, new = (model.encode([getattr(p, way) for p in said], "", False).condition for way in ("old", "new"))
            rest = model.encode(list(stays), "", False).condition if stays else None
        places = [
            (i, s, t)
            for i, pair in enumerate(said)
            for s, t in aligned(pair, columns(pair.old), columns(pair.new), old.shape[1], self.tokens)
        ]
        i, s, t = torch.tensor(places).T
        c, c_star = old[i, s], new[i, t]
        c_j = None if rest is None else rest.flatten(0, 1)
        with torch.no_grad():
            v_star = [m.layer(c_star) - m.added(c) for m in edited]
        solved, foreseen = least_squares(edited, c, v_star, self.lam, c_j, self.edit_weight, self.keep_weight)
        refuse_conflict(foreseen, self.wanted, f"the change {goal}")
        before = {m.name: m.weight.detach().clone() for m in edited}
        after = {m.name: w for m, w in zip(edited, solved, strict=True)}
        return Change(
            "uce", goal, asdict(self) | {"prompts": len(said), "kept": len(stays)}, model.name, model.fingerprint,
            before, after, tuple(map(asdict, foreseen)), time.perf_counter() - began,
        )  # fmt: skip
