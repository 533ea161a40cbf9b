"""Which word says how the things on my pictures stand to each other?

A word <R> is learned from a few pictures whose captions name the things but not their relation, "a X <R> a Y", with the
model frozen (Huang et al. 2023). Its one vector R minimises

    L = E over t ~ f of || eps - eps_theta(x_t, t, c("a X <R> a Y")) ||^2  +  lambda L_steer

* steering: relations live among prepositions. With P_i the vectors of prepositions and N_j those of words that say how
  things look,  L_steer = -log( sum_i exp(R.P_i / tau) / (sum_i exp(R.P_i / tau) + sum_j exp(R.N_j / tau)) ).
* focus: where things stand is settled at noisier times than how they look, so those are drawn more often,
  f(t) = (1 - alpha cos(pi t / T)) / T.

<R> then stands between any two things. ``without`` takes words out of P and N alike, as one that says the relation
already: then what <R> says comes from the pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from ..engine.learned_token import Example, Learned, Teaching, learn, start
from ..engine.prompts import split_words
from ..errors import RunError
from ..method import Card
from ..models.objectives import DiffusionObjective

if TYPE_CHECKING:
    from ..engine.attention import LayerMaps
    from ..engine.progress import Advance

CARD = Card(
    name="reversion",
    verb="ReVersion",
    paper="Huang et al., ReVersion: Diffusion-Based Relation Inversion from Images, 2023",
    systems=("S004-55",),
    question="Can it learn a relation, not a thing, from examples?",
    units=("token",),
    works_on=("Stable Diffusion 1 and 2",),
    needs=("cross-attention",),
    cost="steps x batch denoiser rows with gradients; nothing beyond a plain run to use the word",
    claim="The learned word makes new things stand in the relation of the pictures, though no preposition of that "
    "relation steered it, more often than the word it began with or one learned from pictures of another relation.",
    falsifier={
        "trial": "shapes.relations.inverted",
        "planted": "a relation that the pictures share and no caption says; its own word is not among the prepositions",
        "expect": 0.5,
        "control": "the word it began with, a random vector of equal norm, a word learned from another relation",
        "seconds": 230,
        "status": "not shown",
        "reason": "New things stood in the relation in .30 [.20, .39] of the pictures (8 draws of 8 pictures), with "
        "the word it began with in .20 [.05, .36], with a word of another relation in .16, with the denoising loss "
        "alone in .28: far from the .72 of the model's own words (four other draws). No colour of theirs leaked.",
    },
    departs="Written from what is remembered of the paper and its abstract. Vectors are compared by their cosines, all "
    "prepositions that the model has as one token at each step instead of a sample; N is the captions' own words and, "
    "where the model's words are known, all others. Some tens of Adam steps; any prediction type.",
    avoid="A world where captions name the things: the plain word copies none, so that there is nothing to win by "
    "steering. Pictures of the same two things, or captions that leave one out: the word learns the thing.",
)
PREPOSITIONS = (
    "aboard", "about", "above", "across", "after", "against", "along", "among", "around", "at", "before", "behind",
    "below", "beneath", "beside", "between", "beyond", "by", "down", "for", "from", "in", "inside", "into", "left",
    "near", "of", "off", "on", "onto", "opposite", "out", "outside", "over", "past", "right", "through", "to",
    "toward", "under", "underneath", "up", "upon", "with", "within", "without",
)  # fmt: skip


@dataclass(frozen=True)
class ReVersion:
    """Settings. ``word``: <R>, ``initial``: the word it begins as; ``steer``: lambda, ``tau``; ``alpha``: of f;
    ``positives``: prepositions, those that the model has; ``without``: words that take no part in the steering."""

    word: str = "sks1"
    initial: str = "and"
    steps: int = 40
    batch: int = 4
    rate: float = 0.01
    span: tuple[float, float] = (0.0, 1.0)
    alpha: float = 0.5
    steer: float = 0.01
    tau: float = 0.07
    positives: tuple[str, ...] = PREPOSITIONS
    without: tuple[str, ...] = ()
    seed: int = 0

    def fit(
        self,
        model: Any,
        pictures: Sequence[Any],
        captions: Sequence[str],
        path: Path | None = None,
        advance: Advance | None = None,
    ) -> Learned:
        """Learn <R> from pictures, uint8 [y, x, rgb], or latents [channel, y, x], and their captions, "{}" where <R>
        stands: "a red circle {} a blue square".

        ``path``: a safetensors file that a stopped training goes on from. Raises RunError for captions that do not fit
        the pictures or have no place for <R>, and where no preposition is left; PromptError, ModelError.
        """
        if not pictures or len(pictures) != len(captions) or any("{}" not in c for c in captions):
            found = f"{len(pictures)} pictures, captions {tuple(captions)}"
            raise RunError(f"learn {self.word!r}", found, 'one caption for each picture, as "a circle {} a square"')
        objective = DiffusionObjective(model)
        examples = [Example(c.format(self.word), objective.latents(p)) for p, c in zip(pictures, captions, strict=True)]
        steering = _steering(self, model, examples) if self.steer else None
        teaching = Teaching(self.steps, self.batch, self.rate, self.span, self.seed, self.alpha)
        R = {self.word: start(model, self.initial)}
        return learn(
            model, objective, R, examples, teaching, penalty=steering, settings=asdict(self), path=path, advance=advance
        )  # fmt: skip


@dataclass(frozen=True)
class _Steering:
    """lambda L_steer, of unit vectors P and N, [word, width]."""

    word: str
    weight: float
    tau: float
    P: Tensor
    N: Tensor

    def __call__(
        self, vectors: Mapping[str, Tensor], examples: Sequence[Example], maps: Sequence[Sequence[LayerMaps]]
    ) -> Tensor:
        R = functional.normalize(vectors[self.word], dim=0)
        toward, away = self.P @ R / self.tau, self.N @ R / self.tau
        return self.weight * (torch.cat([toward, away]).logsumexp(0) - toward.logsumexp(0))


def _steering(s: ReVersion, model: Any, examples: Sequence[Example]) -> _Steering:
    known = model.lexicon.words if model.lexicon else set()
    tokenizer = model.pipeline.tokenizer

    def whole(word: str) -> bool:
        return len(tokenizer(word, add_special_tokens=False).input_ids) == 1 and (not known or word in known)

    P = [w for w in s.positives if w not in s.without and whole(w)]
    said = {w for e in examples for w in split_words(e.caption)} | set(known)
    out = {s.word, s.initial, *s.positives, *s.without}
    N = [w for w in sorted(said - out) if whole(w)]
    if not P or not N:
        found = f"{len(P)} prepositions, {len(N)} other words that are one token of the model"
        raise RunError(f"steer {s.word!r}", found, "positives that the model knows, or steer=0")
    unit = [functional.normalize(torch.stack([start(model, w) for w in own]).float(), dim=1) for own in (P, N)]
    return _Steering(s.word, s.steer, s.tau, *unit)
