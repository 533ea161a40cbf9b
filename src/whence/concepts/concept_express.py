"""What separate things does this one picture hold, and which word would draw each? No label, no mask is given.

*Where* (Hao et al. 2024, section on automatic latent concept localisation). The picture is noised a little and shown to
the denoiser. A[place, place] is its self-attention, E[place] its cross-attention to the end-of-text tokens.

    pre-cluster   places by FINCH: each joins its nearest place, by the symmetric KL divergence of their rows of A;
                  joined places are one cluster (the finest of FINCH's partitions)
    filter        clusters whose mean of E is low are background: the end of the text looks at what is salient
    post-cluster  salient clusters that touch are one concept

so the number of concepts I comes out, with a mask M_i for each.

*Which word* (concept-wise masked denoising). With p_i = "a [V_i]", a concept i drawn for each row of a batch,

    L = E || (eps - eps_theta(z_t, t, tau(p_i))) * M_i ||^2  +  lambda_con L_con  +  lambda_att L_att.

Split and merge: a concept begins as several tokens, all trained, L_con pulling those of one concept together and those
of different concepts apart (InfoNCE over cosines); then their mean is the one token that is trained on. L_att is an
earth mover's distance between where a token is looked for and its mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import ndimage
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from ..engine.learned_token import Example, Learned, Teaching, learn, start
from ..engine.prompts import split_words
from ..engine.randomness import torch_stream
from ..engine.self_attention import Places
from ..errors import RunError
from ..method import Card
from ..models.objectives import DiffusionObjective

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..engine.attention import LayerMaps
    from ..engine.progress import Advance

CARD = Card(
    name="concept_express",
    verb="ConceptExpress",
    paper="Hao et al., ConceptExpress: Harnessing Diffusion Models for Single-image Unsupervised Concept Extraction, "
    "ECCV 2024",
    systems=("S004-18",),
    question="What separate concepts does this one picture hold, with no labels?",
    units=("token",),
    works_on=("Stable Diffusion 1 and 2",),
    needs=("cross-attention",),
    cost="four denoiser rows to find the concepts; steps x batch rows with gradients to learn their words",
    claim="The word of a concept redraws its own object and not the picture's other one more often than words learned "
    "on random clusters of equal sizes or on the whole picture.",
    falsifier={
        "trial": "shapes.concepts.extracted",
        "planted": "two objects of a drawn picture, their masks and their number",
        "expect": 0.4,
        "control": "random clusters of equal sizes, one word of the whole picture",
        "seconds": 270,
    },
    departs="Written from the paper's description, not its code. Self-attention of the finest grid alone, and FINCH's "
    "first partition; the filter's threshold is Otsu's on the places' E; clusters that touch are merged. Masks are "
    "widened by a place, as the grid is coarse, and the loss is divided by their area. Tokens begin near a given word. "
    "The earth mover's distance is that of the map's sums over rows and over columns, to those of the mask.",
    avoid="Things that touch each other: they are found as one. Pictures whose grid of latents is coarser than things.",
)


@dataclass(frozen=True)
class ConceptExpress:
    """Settings. ``words``: stem of the new words (sks gives sks1, sks2, ...); ``split``: tokens that a concept begins
    as, for ``split_steps``; then ``steps`` with one each; ``contrast``, ``align``: lambda_con, lambda_att; ``level``:
    how far the picture is noised to be looked at, of the schedule; ``smallest``: places of a concept at least."""

    words: str = "sks"
    initial: str = "square"
    template: str = "a {}"
    split: int = 3
    split_steps: int = 20
    steps: int = 60
    batch: int = 4
    rate: float = 0.01
    span: tuple[float, float] = (0.3, 1.0)
    contrast: float = 0.001
    align: float = 0.01
    level: float = 0.1
    smallest: int = 3
    seed: int = 0

    def localise(self, model: Any, picture: Any) -> NDArray[np.bool_]:
        """Masks [concept, y, x] on the grid of latents; none where nothing is salient.

        ``picture``: uint8 [y, x, rgb], or latents [channel, y, x]. Raises ModelError, WrongMapError.
        """
        objective = DiffusionObjective(model)
        z = objective.latents(picture)
        A, E = _attention(self, model, objective, z)
        first = finch(A)
        height, width = z.shape[1:]
        salient = np.array([E[first == k].mean() for k in range(first.max() + 1)])[first] > _otsu(E)
        touching, number = ndimage.label(salient.reshape(height, width))
        found = [touching == k for k in range(1, number + 1)]
        kept = [m for m in found if m.sum() >= self.smallest]
        return np.stack(kept) if kept else np.zeros((0, height, width), bool)

    def fit(
        self,
        model: Any,
        picture: Any,
        masks: NDArray[np.bool_] | None = None,
        path: Path | None = None,
        advance: Advance | None = None,
    ) -> Concepts:
        """Find the concepts of a picture (or take ``masks``, [concept, y, x]) and learn a word for each.

        ``path``: a safetensors file that a stopped training goes on from; the split stage has one beside it. Raises
        RunError where no concept is found, PromptError, ModelError.
        """
        objective = DiffusionObjective(model)
        z = objective.latents(picture)
        M = self.localise(model, picture) if masks is None else masks
        if not len(M) or M.shape[1:] != z.shape[1:]:
            found = f"masks of {M.shape[1:]} places" if len(M) else "nothing in it stands out"
            raise RunError("the concepts of this picture", found, f"things on a ground; masks of {tuple(z.shape[1:])}")
        teaching = Teaching(self.steps, self.batch, self.rate, self.span, self.seed)
        names = [f"{self.words}{i + 1}" for i in range(len(M))]
        wide = [torch.from_numpy(ndimage.binary_dilation(m, np.ones((3, 3)))).float() for m in M]

        def examples(words: Sequence[Sequence[str]]) -> list[Example]:
            return [Example(self.template.format(w), z, m) for own, m in zip(words, wide, strict=True) for w in own]

        split = [[f"{n}x{j}" for j in range(self.split)] for n in names]
        about = asdict(self) | {"masks": M.sum((1, 2)).tolist()}
        align = _Alignment(self.align)
        begin = _begin(self, model, split)
        if self.split_steps:
            beside = path.with_name(f"{path.stem}-split.safetensors") if path else None
            first = learn(
                model, objective, begin, examples(split), replace(teaching, steps=self.split_steps),
                penalty=_Contrast(split, self.contrast, align), attention=self.align > 0, settings=about, path=beside,
                advance=advance,
            )  # fmt: skip
            begin = dict(first.vectors)
        merged = {n: torch.stack([begin[w] for w in own]).mean(0) for n, own in zip(names, split, strict=True)}
        words = learn(
            model, objective, merged, examples([[n] for n in names]), teaching, penalty=align,
            attention=self.align > 0, settings=about, path=path, advance=advance,
        )  # fmt: skip
        return Concepts(words, M)


@dataclass(frozen=True)
class Concepts:
    """The words of a picture's concepts and where each is: ``masks`` [concept, y, x] on the grid of latents, in the
    order of ``words.vectors``."""

    words: Learned
    masks: NDArray[np.bool_]


def _attention(s: ConceptExpress, model: Any, objective: DiffusionObjective, z: Tensor) -> tuple[Any, Any]:
    """A[place, place] and E[place], means over four noises."""
    condition = model.encode([""], "", False).condition
    t = int(s.level * len(objective.alphas))
    alpha = objective.alphas[t].to(z)
    noise = torch.randn((4, *z.shape), generator=torch_stream("concept express", s.seed)).to(z)
    x = alpha.sqrt() * z + (1 - alpha).sqrt() * noise
    places = Places(z.shape[1] * z.shape[2])
    with places.on(objective.module):
        objective.module(x, torch.full((4,), t), encoder_hidden_states=condition.expand(4, -1, -1))
    # All but the first token are ends of the text: CLIP fills up with them.
    return places.self_maps.cpu().double().numpy(), places.text_maps[:, 1:].sum(1).cpu().double().numpy()


def finch(p: NDArray[np.float64]) -> NDArray[np.intp]:
    """Labels of the first partition of FINCH (Sarfraz et al. 2019, eq. 1): rows are joined with their first neighbour,
    by the symmetric KL divergence of distributions ``p[row, column]``."""
    logs = np.log(p + 1e-9)
    own, cross = (p * logs).sum(1), p @ logs.T
    distance = own[:, None] + own - cross - cross.T
    np.fill_diagonal(distance, np.inf)
    joined = np.zeros(distance.shape, bool)
    joined[np.arange(len(p)), distance.argmin(1)] = True
    return np.asarray(connected_components(joined, directed=False)[1], np.intp)


def _otsu(values: NDArray[np.float64]) -> float:
    """The threshold that leaves the least variance within the two sides."""
    x = np.sort(values)
    n = np.arange(1, len(x))
    low, high = np.cumsum(x)[:-1] / n, (x.sum() - np.cumsum(x)[:-1]) / (len(x) - n)
    best = int((n * (len(x) - n) * (high - low) ** 2).argmax())
    return float((x[best] + x[best + 1]) / 2)


def _begin(s: ConceptExpress, model: Any, split: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    v = start(model, s.initial)
    drawn = {w: torch.randn(v.shape, generator=torch_stream("split", s.seed, w)).to(v) for own in split for w in own}
    return {w: v + 0.5 * v.norm() * d / d.norm() for w, d in drawn.items()}


@dataclass(frozen=True)
class _Alignment:
    """lambda_att L_att: how far the places where a word is looked for are from its mask, in pictures."""

    weight: float

    def __call__(
        self, vectors: Mapping[str, Tensor], examples: Sequence[Example], maps: Sequence[Sequence[LayerMaps]]
    ) -> Tensor:
        total = torch.zeros(())
        if not maps:
            return total
        for e, grids in zip(examples, maps, strict=True):
            fine = max(grids, key=lambda m: m.height * m.width)
            p = fine.values[0, 0, next(i for i, w in enumerate(split_words(e.caption)) if w in vectors)]
            assert e.mask is not None
            q = torch.nn.functional.adaptive_avg_pool2d(e.mask[None, None].to(p), (fine.height, fine.width))[0, 0]
            p, q = p / p.sum(), q / q.sum()
            for axis in (0, 1):
                total = total + (p.sum(axis).cumsum(0) - q.sum(axis).cumsum(0)).abs().mean()
        return self.weight * total / len(examples)


@dataclass(frozen=True)
class _Contrast:
    """lambda_con L_con over the split tokens, and the alignment."""

    split: Sequence[Sequence[str]]
    weight: float
    align: _Alignment
    tau: float = 0.07

    def __call__(
        self, vectors: Mapping[str, Tensor], examples: Sequence[Example], maps: Sequence[Sequence[LayerMaps]]
    ) -> Tensor:
        unit = torch.nn.functional.normalize(torch.stack([vectors[w] for own in self.split for w in own]), dim=1)
        owner = torch.tensor([i for i, own in enumerate(self.split) for _ in own])
        alike = (unit @ unit.T / self.tau).masked_fill(torch.eye(len(unit), dtype=torch.bool), -torch.inf)
        same = (owner[:, None] == owner) & ~torch.eye(len(unit), dtype=torch.bool)
        total = self.align(vectors, examples, maps)
        if len(self.split) < 2 or not bool(same.any()):
            return total
        log = alike - alike.logsumexp(1, keepdim=True)
        return total - self.weight * log[same].mean()
