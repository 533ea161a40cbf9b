"""Several things stand on one picture: can each be learned as a word of its own, with no mask given?

The model is told what the things are called, one class noun each, and finds by its own attention where they are
(Shentu et al. 2024). With C_i[place] the cross-attention of class noun i and S[place, place] the self-attention of the
picture, noised a little, under the caption "a <noun 1> and a <noun 2> ...",

    C'_i = S^tau C_i, scaled to 0..1          attention spreads over places that look alike
    M_i  = places where C'_i is the largest and above ``threshold``;   no concept's: the background

in one initialisation step. Then a word [V_i] stands before each noun, and all are learned by

    L = E || (eps - eps_theta(z_t, t, c(y))) * M_y ||^2  +  lambda sum over i in y, w in {[V_i], noun i} of
        mean over places (A_w / max A_w - M_i)^2,

y the caption of a step, M_y the union of the masks it names and A_w the cross-attention of its words. ``sampling`` says
which concepts a caption names: all of them (together), or one, each as often (uniform) or in shares that give concepts
which are attended to weakly more steps, so that all are learned in one time (reweighted).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from ..engine.attention import AttentionTape
from ..engine.capture import Plan
from ..engine.learned_token import Example, Learned, Teaching, learn, start
from ..engine.prompts import split_words
from ..engine.randomness import torch_stream
from ..engine.self_attention import Places
from ..errors import PromptError, RunError
from ..method import Card
from ..models.objectives import DiffusionObjective

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..engine.attention import LayerMaps
    from ..engine.progress import Advance

CARD = Card(
    name="atten_craft",
    verb="AttenCraft",
    paper="Shentu, Watson and Al Moubayed, AttenCraft: Attention-guided Disentanglement of Multiple Concepts for "
    "Text-to-Image Customization, 2024",
    systems=("S004-01",),
    question="Can I teach the model several things from one picture, without masks?",
    units=("token",),
    works_on=("Stable Diffusion 1 and 2",),
    needs=("cross-attention",),
    cost="four denoiser rows for the masks; steps x batch rows with gradients to learn the words",
    claim="The places that the model's own attention gives to a noun overlap the thing of that name on a picture of "
    "several, more than another noun's mask or random clusters of equal sizes do.",
    falsifier={
        "trial": "shapes.several.located",
        "planted": "two objects of a drawn picture and their masks, by the nouns of their shapes",
        "expect": 0.5,
        "control": "random clusters of equal sizes, the mask of the other noun",
        "seconds": 20,
    },
    departs="Written from the abstract and what is remembered of the paper: exponents, threshold and the rule of the "
    "shares are this file's. The words alone are learned, not the denoiser's weights. Cross-attention of the grid "
    "below the finest, self-attention of the finest. Masks of the denoising loss are widened by a place, as the grid "
    "is coarse, and the loss is divided by their area.",
    avoid="Not shown: that words gain by the masks. On the embedded model a word gave its own thing's colour, not the "
    "other's, in .77 [.52, 1.00] of the pictures, on random clusters in .42 [.14, .70], by its noun alone in .14, and "
    "trained together without masks in .97 [.92, 1.00] (8 pictures, `several.crafted`): captions with both nouns keep "
    "words apart there already. Two things of one class, or a class that the model does not know: nouns find nothing.",
)
SAMPLING = ("together", "uniform", "reweighted")
COPIES = 8
"""Examples that the shares of a reweighted sampling are rounded to."""


@dataclass(frozen=True)
class AttenCraft:
    """Settings. ``words``: stem of the new words (sks gives sks1, sks2, ...), ``initial``: the word they begin as
    (none: each as its noun); ``phrase``: a concept in a caption, its word and its noun; ``level``: how far the picture
    is noised to be looked at, of the schedule; ``align``: lambda; ``widen``: places that the masks of the denoising
    loss reach further."""

    words: str = "sks"
    initial: str = "large"
    phrase: str = "a {word} {noun}"
    sampling: str = "uniform"
    steps: int = 40
    batch: int = 4
    rate: float = 0.01
    span: tuple[float, float] = (0.3, 1.0)
    align: float = 0.1
    tau: int = 1
    threshold: float = 0.5
    level: float = 0.3
    widen: int = 1
    seed: int = 0

    def localise(self, model: Any, picture: Any, nouns: Sequence[str]) -> NDArray[np.bool_]:
        """Masks [concept, y, x] on the grid of latents, none on another, in the order of the nouns.

        ``picture``: uint8 [y, x, rgb], or latents [channel, y, x]. Raises RunError for fewer than two nouns,
        PromptError for one that is no word of the model, ModelError, WrongMapError.
        """
        objective = DiffusionObjective(model)
        z = objective.latents(picture)
        C, S = _attention(self, model, objective, z, nouns)
        for _ in range(self.tau):
            C = S @ C
        C = C - C.min(0, keepdim=True)[0]
        C = C / C.max(0, keepdim=True)[0].clamp(min=1e-12)
        own = torch.where(C.max(1)[0] > self.threshold, C.argmax(1), -1).numpy().reshape(z.shape[1:])
        return np.stack([own == i for i in range(len(nouns))])

    def fit(
        self,
        model: Any,
        picture: Any,
        nouns: Sequence[str],
        masks: NDArray[np.bool_] | None = None,
        path: Path | None = None,
        advance: Advance | None = None,
    ) -> Crafted:
        """Find where the nouns are (or take ``masks``, [concept, y, x]) and learn a word for each.

        ``path``: a safetensors file that a stopped training goes on from. Raises RunError where a noun has no place of
        its own, PromptError, ModelError.
        """
        if self.sampling not in SAMPLING or "{word}" not in self.phrase:
            found = f"sampling {self.sampling!r}, phrase {self.phrase!r}"
            raise RunError("learn several words", found, f"{', '.join(SAMPLING)}; a phrase that says {{word}}")
        objective = DiffusionObjective(model)
        z = objective.latents(picture)
        M = self.localise(model, picture, nouns) if masks is None else masks
        if M.shape != (len(nouns), *z.shape[1:]) or not M.any((1, 2)).all():
            empty = [n for n, m in zip(nouns, M, strict=False) if not m.any()]
            found = f"no place for {', '.join(empty)}" if empty else f"masks of {M.shape}"
            raise RunError(f"the words of {', '.join(nouns)}", found, f"masks of {(len(nouns), *z.shape[1:])}")
        words = [f"{self.words}{i + 1}" for i in range(len(nouns))]
        phrases = [self.phrase.format(word=w, noun=n) for w, n in zip(words, nouns, strict=True)]
        wide = [torch.from_numpy(_widened(m, self.widen)).float() for m in M]
        shares = [1] * len(nouns)
        if self.sampling == "together":
            examples = [Example(" and ".join(phrases), z, torch.stack(wide).amax(0))]
        else:
            if self.sampling == "reweighted":
                shares = _shares(self, model, objective, z, nouns, M)
            examples = [Example(p, z, m) for p, m, k in zip(phrases, wide, shares, strict=True) for _ in range(k)]
        align = _Alignment(self.align, {w: torch.from_numpy(m).float() for w, m in zip(words, M, strict=True)})
        learned = learn(
            model, objective, {w: start(model, self.initial or n) for w, n in zip(words, nouns, strict=True)}, examples,
            Teaching(self.steps, self.batch, self.rate, self.span, self.seed),
            penalty=align if self.align else None, attention=self.align > 0,
            settings=asdict(self) | {"nouns": list(nouns), "masks": M.sum((1, 2)).tolist(), "shares": shares},
            path=path, advance=advance,
        )  # fmt: skip
        return Crafted(learned, tuple(phrases), M)


@dataclass(frozen=True)
class Crafted:
    """The words of a picture's things, how a prompt says each, and where it is: ``masks`` [concept, y, x] on the grid
    of latents, in the order of ``words.vectors``."""

    words: Learned
    phrases: tuple[str, ...]
    masks: NDArray[np.bool_]


def _attention(
    s: AttenCraft, model: Any, objective: DiffusionObjective, z: Tensor, nouns: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """C[place, concept] and S[place, place], means over four noises."""
    if len(nouns) < 2 or len(set(nouns)) < len(nouns):
        raise RunError("find several things", f"the nouns {', '.join(nouns) or 'none'}", "two or more that differ")
    caption = " and ".join(f"a {n}" for n in nouns)
    said = split_words(caption)
    if missing := [n for n in nouns if n not in said]:
        raise PromptError(f"the noun {missing[0]!r}", "no single word", "one word each")
    condition = model.encode([caption], "", False).condition.expand(4, -1, -1)
    t = int(s.level * len(objective.alphas))
    alpha = objective.alphas[t].to(z)
    noise = torch.randn((4, *z.shape), generator=torch_stream("atten craft", s.seed)).to(z)
    x = alpha.sqrt() * z + (1 - alpha).sqrt() * noise
    height, width = z.shape[1:]
    scale = model.pipeline.vae_scale_factor
    places = (model.columns(model.words(caption)),) * 4
    tape, among = AttentionTape(mode="grad"), Places(height * width)
    with torch.no_grad(), tape.on(
        Plan(objective.module, model.layers(height * scale, width * scale), condition, places, 1)
    ), among.on(objective.module):  # fmt: skip
        objective.module(x, torch.full((4,), t), encoder_hidden_states=condition)
    maps = []
    for row in range(4):
        grids = sorted(tape.layers(row), key=lambda m: -m.height * m.width)
        # The finest grid tells things from the ground but hardly from each other: the next one knows what they are.
        grid = grids[1] if len(grids) > 1 else grids[0]
        fine = functional.interpolate(grid.values.mean((0, 1))[None], (height, width), mode="bilinear")[0]
        maps.append(fine[[said.index(n) for n in nouns]].flatten(1).T)
    return torch.stack(maps).mean(0).cpu().double(), among.self_maps.cpu().double()


def _widened(mask: NDArray[np.bool_], places: int) -> NDArray[np.bool_]:
    return np.asarray(ndimage.binary_dilation(mask, np.ones((3, 3)), places)) if places else mask


def _shares(
    s: AttenCraft, model: Any, objective: DiffusionObjective, z: Tensor, nouns: Sequence[str], M: NDArray[np.bool_]
) -> list[int]:
    """Examples of each concept: the weaker its noun is attended to within its mask, the more."""
    C, _ = _attention(s, model, objective, z, nouns)
    score = torch.stack([C[torch.from_numpy(m).flatten(), i].mean() for i, m in enumerate(M)])
    share = 1 / score.clamp(min=1e-9)
    return [max(int(x), 1) for x in (COPIES * share / share.sum()).round()]


@dataclass(frozen=True)
class _Alignment:
    """lambda times how far the maps of a word and its noun are from the word's mask, squared, over all grids."""

    weight: float
    masks: Mapping[str, Tensor]

    def __call__(
        self, vectors: Mapping[str, Tensor], examples: Sequence[Example], maps: Sequence[Sequence[LayerMaps]]
    ) -> Tensor:
        total, count = torch.zeros(()), 0
        for e, grids in zip(examples, maps, strict=True):
            said = split_words(e.caption)
            for word, mask in self.masks.items():
                if word not in said:
                    continue
                place = said.index(word)
                noun = place + 1 < len(said) and said[place + 1] != "and"
                for grid in grids:
                    A = grid.values[0, 0, place : place + 1 + noun]
                    A = A / A.amax((1, 2), keepdim=True).clamp(min=1e-9)
                    want = functional.adaptive_avg_pool2d(mask[None, None].to(A), (grid.height, grid.width))[0]
                    total, count = total + ((A - want) ** 2).mean(), count + 1
        return self.weight * total / max(count, 1)
