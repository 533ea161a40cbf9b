"""Change what a model assumes when a prompt does not say: all tokens of a source prompt read as those of a destination.

TIME (Orgad et al. 2023, section 4) takes a source prompt ("a pack of roses") and a destination ("a pack of blue
roses"), matches each source token's embedding c_i with the destination's embedding c_i* of the same token, and sets for
every key and value projection W of the cross-attention:

    W* = argmin  sum_i |W c_i - W_0 c_i*|^2 + lam |W - W_0|^2                                                (eq. 3)
       = (lam W_0 + sum_i v_i* c_i^T)(lam I + sum_i c_i c_i^T)^-1,    v_i* = W_0 c_i*                        (eq. 4)

It touches about 2 % of Stable Diffusion's parameters, keeps no list of what must stay, and relies on lam for that.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from ..change import Change, Goal
from ..method import Card
from ..worlds.shapes.editing import examples

CARD = Card(
    name="time",
    verb="TIME",
    paper="Orgad, Kawar and Belinkov, Editing Implicit Assumptions in Text-to-Image Diffusion Models, ICCV 2023",
    systems=(),
    question="What if the model assumed this whenever the prompt says that?",
    units=("matrix",),
    works_on=("Stable Diffusion 1 and 2", "SDXL"),
    needs=("cross-attention",),
    cost="no picture: prompts are read by the text encoder, one linear system is solved for all matrices",
    claim="With all tokens of prompts with one colour read as those of prompts with another, the other colour is "
    "drawn, and other colours stay; the same deltas at other matrices of the model do not.",
    falsifier={
        "trial": "shapes.editing.measure",
        "planted": "prompts with the old colour must draw the new one at the same seed; prompts without it must stay",
        "expect": 0.8,
        "control": "the same deltas moved to other matrices of the model",
        "seconds": 120,
    },
    departs="Several source prompts where the model's world has them; end and padding tokens are matched too. Equation "
    "numbers are from memory.",
    avoid="Where neighbours must not move: there is no keep set. Use uce.",
)


@dataclass(frozen=True)
class TIME:
    """Settings. ``lam``: the paper's .1; ``tokens``: "all", or as in UCE."""

    lam: float = 0.1
    tokens: str = "all"

    def plan(self, model: Any, goal: Goal | str) -> Change:
        """The change of ``"source -> destination"`` for this model; nothing is touched. Raises PromptError,
        ModelError."""
        import torch

        from ..engine.rewording import aligned, pairs
        from ..engine.weights import cross_attention, least_squares

        def columns(prompt: str) -> Any:
            return model.columns(model.words(prompt))

        began, goal = time.perf_counter(), Goal.of(goal)
        said = pairs(model, goal, examples(model, goal.old))
        edited = cross_attention(model)
        with torch.no_grad():
            source, destination = (
                model.encode([getattr(p, way) for p in said], "", False).condition for way in ("old", "new")
            )
        places = [
            (i, s, t)
            for i, pair in enumerate(said)
            for s, t in aligned(pair, columns(pair.old), columns(pair.new), source.shape[1], self.tokens)
        ]
        i, s, t = torch.tensor(places).T
        c, c_star = source[i, s], destination[i, t]
        with torch.no_grad():
            v_star = [m.layer(c_star) - m.added(c) for m in edited]
        solved, foreseen = least_squares(edited, c, v_star, self.lam)
        before = {m.name: m.weight.detach().clone() for m in edited}
        after = {m.name: w for m, w in zip(edited, solved, strict=True)}
        return Change(
            "time", goal, asdict(self) | {"prompts": len(said)}, model.name, model.fingerprint, before, after,
            tuple(map(asdict, foreseen)), time.perf_counter() - began,
        )  # fmt: skip
