"""Which of several things does the model draw when the prompt does not say, and can each have its share?

UCE (Gandikota et al. 2024, section on debiasing) takes a concept c ("doctor") and attributes a_1 ... a_p ("woman",
"man"), and lets the concept's keys and values read as the concept with a little of each attribute,

    v* = W_0 (c + alpha_1 a_1 + ... + alpha_p a_p),

solved for as in `uce`, with what shall stay beside. Nothing says which alpha gives which share of the pictures, so they
are found by drawing: pictures of the edited model are judged, and each attribute's alpha moves by what its share lacks,

    alpha_p  <-  alpha_p + eta (wanted_p - share_p),

until the shares are those wanted. Pictures cost; the matrices themselves are one shared factorisation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..change import Change, Goal
from ..engine.journal import Journal
from ..engine.randomness import seed_of, stream
from ..errors import MethodError, PromptError
from ..method import Card
from ..worlds.shapes import debiasing

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from ..engine.progress import Advance
    from ..engine.rewording import Pair

    Judge = Callable[[Any], int | None]

CARD = Card(
    name="uce_debias",
    verb="Debias",
    paper="Gandikota, Orgad, Belinkov, Materzynska and Bau, Unified Concept Editing in Diffusion Models, WACV 2024",
    systems=(),
    question="Which of several things does the model draw when the prompt does not say, and can each have its share?",
    units=("matrix",),
    works_on=("Stable Diffusion 1 and 2", "SDXL"),
    needs=("cross-attention",),
    cost="rounds x pictures pictures, judged; between two rounds one linear system for all matrices",
    claim="Prompts that name no colour draw all colours in shares nearer to equal ones than before, and nearer than "
    "with the same strengths given to the wrong colours or the same deltas at other matrices.",
    falsifier={
        "trial": "shapes.debiasing.measure",
        "planted": "the colours that the model prefers when a prompt names none, counted by the oracle",
        "expect": 0.02,
        "control": "the same strengths given to other colours, the same deltas moved to other matrices",
        "seconds": 270,
    },
    departs="a_p is the state of the prompt that says the attribute less that of the prompt that does not, for the "
    "concept's last token and all after it. The strengths add up to nothing, their steps shrink from round to round, "
    "and the last half of the rounds is averaged. All attributes move at once; the paper freezes concepts "
    "that are done. Judged by the oracle on this world, by a judge of your own elsewhere (the paper's is CLIP). "
    "Equation from memory.",
    avoid="To change what a prompt that names the attribute draws: this leaves that alone.",
)


@dataclass(frozen=True)
class Debias:
    """Settings. ``rounds`` of ``pictures`` pictures each, in ``steps`` steps at ``guidance``; ``eta``: the first step
    of the strengths, ``shrink``: of one round's to the next; ``wanted``: shares in the goal's order (none: equal ones);
    ``lam``, ``keep_weight``, ``keep``: as in UCE; ``strengths``: alpha, where they are known: no picture is drawn."""

    rounds: int = 8
    pictures: int = 48
    eta: float = 0.6
    shrink: float = 0.85
    wanted: tuple[float, ...] = ()
    lam: float = 0.5
    keep_weight: float = 1.0
    keep: int = 160
    steps: int = 8
    guidance: float = 1.0
    strengths: tuple[float, ...] = ()
    seed: int = 0

    pieces: ClassVar[str] = "pictures"

    @property
    def work(self) -> int:
        """How many pictures a plan draws."""
        return 0 if self.strengths else self.rounds * self.pictures

    def plan(
        self,
        model: Any,
        goal: Goal | str,
        judge: Judge | None = None,
        path: Path | None = None,
        advance: Advance | None = None,
    ) -> Change:
        """The change of ``"circle -> red circle | blue circle"``: what a prompt with the first phrase draws shall be
        each of the others in its wanted share. The model is as it was when this returns.

        ``judge``: the number of the attribute that a picture, uint8 [y, x, rgb], shows, None for none of them (none
        given: the oracle, on this world's model). ``path``: a journal of judged rounds, that a stopped plan goes on
        from. Raises PromptError for a goal without two attributes, MethodError for shares that are none, ModelError for
        a model whose pictures nothing judges, OutputError for a journal that cannot be kept.
        """
        began, goal = time.perf_counter(), Goal.of(goal)
        options = goal.options
        wanted = self._shares(options)
        if judge is None and not self.strengths:
            judge = debiasing.judge(model, options)
        desk = _Desk(self, model, goal, options)
        journal = Journal(path) if path else None
        alpha, history = np.zeros(len(options)), []
        tried: list[NDArray[np.float64]] = []
        if self.strengths:
            alpha, rounds = np.asarray(self.strengths, float), 0
        else:
            rounds = self.rounds
        for number in range(rounds):
            share = self._round(model, desk, alpha, judge, number, journal, advance)
            history.append({"strengths": alpha.round(4).tolist(), "shares": share.round(4).tolist()})
            tried.append(alpha)
            alpha = alpha + self.eta * self.shrink**number * (wanted - share)
            alpha = alpha - alpha.mean()
        if tried:
            alpha = np.mean([*tried[len(tried) // 2 + 1 :], alpha], 0)
        after, foreseen = desk.solve(alpha)
        settings = asdict(self) | {"strengths": [round(float(a), 6) for a in alpha], "found": history}
        return Change("uce_debias", goal, settings, model.name, model.fingerprint, desk.before, after, foreseen,
                      time.perf_counter() - began)  # fmt: skip

    def _shares(self, options: Sequence[str]) -> NDArray[np.float64]:
        k = len(options)
        if k < 2:
            raise PromptError(
                f"shares of {' | '.join(options)!r}", "one attribute", "'circle -> red circle | blue circle'"
            )
        wanted = np.asarray(self.wanted or [1 / k] * k, float)
        works = f"{k} shares above 0 that add up to 1, {k} strengths, 2 pictures and 1 round or more"
        if len(wanted) != k or (wanted <= 0).any() or abs(wanted.sum() - 1) > 1e-6:
            raise MethodError(f"wanted shares {tuple(self.wanted)}", f"{k} attributes", works)
        if (self.strengths and len(self.strengths) != k) or self.rounds < 1 or self.pictures < 2:
            found = f"{len(self.strengths)} strengths, {self.rounds} rounds of {self.pictures} pictures"
            raise MethodError("shares of attributes", found, works)
        return wanted

    def _round(
        self,
        model: Any,
        desk: _Desk,
        alpha: NDArray[np.float64],
        judge: Any,
        number: int,
        journal: Journal | None,
        advance: Any,
    ) -> NDArray[np.float64]:
        """The share of this round's pictures that shows each attribute, with these strengths."""
        from ..run import Settings

        name = ("uce_debias", model.fingerprint, desk.goal, asdict(self), alpha.tolist(), number)
        if journal is not None and (known := journal.get(*name)) is not None:
            return np.asarray(known, float)
        height, width = model.default_size
        prompts = stream("debias", self.seed, number).choice(desk.prompts, self.pictures)
        many = [
            Settings(str(p), seed_of("debias", self.seed, number, i) % 2**31, self.steps, self.guidance, height, width)
            for i, p in enumerate(prompts)
        ]
        after, foreseen = desk.solve(alpha)
        change = Change("uce_debias", desk.goal, {}, model.name, model.fingerprint, desk.before, after, foreseen)
        with change.on(model):
            shown = [judge(run.images[0]) for run in model.generate_many(many, batch=32)]
        share = np.array([sum(s == k for s in shown) for k in range(len(alpha))]) / len(shown)
        if journal is not None:
            journal.put(share.tolist(), *name)
        if advance:
            advance(len(many), f"round {number + 1}: {', '.join(f'{s:.0%}' for s in share)}")
        return share


class _Desk:
    """The keys of prompts that name no attribute, the values of those that do, and what is kept: read once."""

    def __init__(self, settings: Debias, model: Any, goal: Goal, options: Sequence[str]) -> None:
        import torch

        from ..engine.prompts import split_words
        from ..engine.rewording import aligned, kept, pairs
        from ..engine.weights import cross_attention

        self.settings, self.goal = settings, goal
        self.edited = cross_attention(model)
        said = [pairs(model, Goal(goal.old, o, goal.prompts), debiasing.examples(model, goal.old)) for o in options]
        own = {w for o in options for w in split_words(o.lower())} - set(split_words(goal.old.lower()))
        if named := [p.old for p in said[0] if own & set(split_words(p.old.lower()))]:
            raise PromptError(
                f"the change {goal}", f"{named[0]!r} names an attribute already", "prompts that name none"
            )
        self.prompts = list(dict.fromkeys(p.old for p in said[0]))

        def columns(prompt: str) -> Any:
            return model.columns(model.words(prompt))

        def read(prompts: Sequence[str]) -> Tensor:
            with torch.no_grad():
                found: Tensor = model.encode(list(prompts), "", False).condition
            return found

        old = read([p.old for p in said[0]])

        def states(own: Sequence[Pair]) -> tuple[Tensor, Tensor]:
            new = read([p.new for p in own])
            at = [
                (i, s, t)
                for i, p in enumerate(own)
                for s, t in aligned(p, columns(p.old), columns(p.new), old.shape[1], "later")
            ]
            i, s, t = torch.tensor(at).T
            return old[i, s], new[i, t]

        found = [states(own) for own in said]
        self.c = found[0][0]
        stays = kept(model, Goal(goal.old, options[0], goal.prompts, (*options, *goal.keep)), said[0], settings.keep)
        self.c_j = read(stays).flatten(0, 1)
        with torch.no_grad():
            self.plain = [m.layer(self.c) - m.added(self.c) for m in self.edited]
            self.toward = [
                torch.stack([m.layer(a) - m.added(a) for _, a in found]) - v
                for m, v in zip(self.edited, self.plain, strict=True)
            ]
        self.before = {m.name: m.weight.detach().clone() for m in self.edited}

    def solve(self, alpha: NDArray[np.float64]) -> tuple[dict[str, Tensor], tuple[dict[str, Any], ...]]:
        """The matrices with these strengths, and what is foreseen of each. The model holds its own meanwhile."""
        import torch

        from ..engine.weights import least_squares

        a = torch.as_tensor(alpha).to(self.c)
        values = [v + torch.einsum("p,pnd->nd", a, t) for v, t in zip(self.plain, self.toward, strict=True)]
        s = self.settings
        solved, foreseen = least_squares(self.edited, self.c, values, s.lam, self.c_j, 1.0, s.keep_weight)
        after = {m.name: w for m, w in zip(self.edited, solved, strict=True)}
        return after, tuple(map(asdict, foreseen))
