"""Is it the thing or the ground that my word learned?

A word learned from a few pictures takes along what they share beside the thing. Here each picture x_i is said by
several words (Cai et al. 2024): S*, the thing's, shared by all pictures, and attribute words of its own, P_i for the
pose and B_i for the background, which attribute mappers make of the picture:

    P_i, B_i = M_P(E(x_i)), M_B(E(x_i))                                  E: a feature of the picture, M: an MLP
    L_all     = || eps - eps_theta(z_t, t, c("a P_i S* on B_i")) ||^2    all words say the whole picture
    L_subject = m_i || eps - eps_theta(z'_t, t, c("a S*")) ||^2          S* alone says the thing, cut out by its mask

S* and the mappers are trained on both jointly, everything else is frozen. To draw the thing elsewhere S* is said
alone; a picture's own P_i and B_i can be said with it to have that picture's pose or ground again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..engine.learned_token import Example, Learned, Teaching, learn, start
from ..engine.randomness import torch_stream
from ..errors import RunError
from ..method import Card
from ..models.objectives import DiffusionObjective

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..engine.progress import Advance

CARD = Card(
    name="detex",
    verb="DETEX",
    paper="Cai et al., Decoupled Textual Embeddings for Customized Image Generation, AAAI 2024",
    systems=("S004-04",),
    question="Is it the subject or the background that my personal word learned?",
    units=("token",),
    works_on=("Stable Diffusion 1 and 2",),
    needs=("cross-attention",),
    cost="steps x batch denoiser rows with gradients; nothing beyond a plain run to use the words",
    claim="Learned from pictures of a thing that all have one ground, the subject word draws the thing on other "
    "grounds that the prompt names more often than a single word learned in as many steps.",
    falsifier={
        "trial": "shapes.subjects.decoupled",
        "planted": "a ground that all pictures of a thing share and no caption says",
        "expect": 0.4,
        "control": "a single word of as many steps, a random vector of equal norm, the word it began with",
        "seconds": 900,
    },
    departs="Written from the paper's abstract and from memory of its method, not its code. S* and the mappers alone "
    "are trained, not the denoiser's keys and values. E is the latents of the model's own autoencoder on a coarse "
    "grid, as it has no CLIP image encoder. The thing is cut out on white, and its loss divided by the mask's area. "
    "Half of the rows of a step, in the mean, say S* alone. Attribute words stand where pose and ground are said.",
    avoid="Without a mask of the thing: what tells the thing from its ground is the mask, all pictures having both. "
    "A single word of the thing cut out, with no attribute words, does no worse on shapes (.55 to .42).",
)


@dataclass(frozen=True)
class DETEX:
    """Settings. ``word``: S*; ``initial``: a coarse descriptor it begins as; ``attributes``: stems of the attribute
    words (P1, P2, ... of pictures 1, 2, ...) and what they begin as; ``caption``: of S* alone; ``full``: of all words,
    stems in braces; ``hidden``: width of the mappers; the rest is of the learning (`engine/learned_token.py`)."""

    word: str = "sks1"
    initial: str = "square"
    attributes: tuple[tuple[str, str], ...] = (("pose", "small"), ("ground", "fog"))
    caption: str = "a {word}"
    full: str = "a {pose} {word} on {ground}"
    hidden: int = 64
    steps: int = 60
    batch: int = 4
    rate: float = 0.01
    span: tuple[float, float] = (0.3, 1.0)
    seed: int = 0

    def fit(
        self,
        model: Any,
        pictures: Sequence[NDArray[np.uint8]],
        masks: Sequence[NDArray[np.bool_]],
        path: Path | None = None,
        advance: Advance | None = None,
    ) -> Learned:
        """Learn S* and each picture's attribute words from pictures of one thing, uint8 [y, x, rgb], and the thing's
        masks [y, x] on them.

        ``path``: a safetensors file that a stopped training goes on from. Raises RunError for no pictures, masks of
        other sizes or without the thing, captions that leave a word out; PromptError for words that cannot be learned
        or begun with; ModelError for a model that takes more than a prompt and a time.
        """
        _check(self, pictures, masks)
        objective = DiffusionObjective(model)
        z = [objective.latents(x) for x in pictures]
        mappers = _Mappers(z, {stem: start(model, begin) for stem, begin in self.attributes}, self.hidden, self.seed)
        both = []
        for i, (x, m) in enumerate(zip(pictures, masks, strict=True)):
            own = {stem: f"{stem}{i + 1}" for stem, _ in self.attributes}
            both.append(Example(self.full.format(word=self.word, **own), z[i]))
            cut = objective.latents(np.where(m[..., None], x, np.uint8(255)))
            # Every place that the thing touches: the grid of latents is coarser than the picture.
            where = functional.adaptive_max_pool2d(torch.from_numpy(m)[None].float(), z[i].shape[1:])[0]
            both.append(Example(self.caption.format(word=self.word), cut, where))
        teaching = Teaching(self.steps, self.batch, self.rate, self.span, self.seed)
        v = {self.word: start(model, self.initial)}
        return learn(model, objective, v, both, teaching, mapper=mappers, settings=asdict(self), path=path,
                     advance=advance)  # fmt: skip


class _Mappers(nn.Module):
    """M_a for each attribute a: an MLP of E(x_i), which begins as the vector of a word whatever the picture."""

    def __init__(self, z: Sequence[Tensor], begin: dict[str, Tensor], hidden: int, seed: int, grid: int = 4) -> None:
        super().__init__()
        flat = torch.stack([functional.adaptive_avg_pool2d(x[None], grid)[0].flatten() for x in z])
        self.E = (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True).clamp(min=1e-6)
        wide, self.stems = flat.shape[1], tuple(begin)  # a ParameterDict has an order of its own
        drawn = {a: torch.randn(wide, hidden, generator=torch_stream("mapper", seed, a)) / wide**0.5 for a in begin}
        self.first = nn.ParameterDict({a: nn.Parameter(w.to(flat)) for a, w in drawn.items()})
        self.second = nn.ParameterDict({a: nn.Parameter(v.new_zeros(hidden, len(v))) for a, v in begin.items()})
        self.base = nn.ParameterDict({a: nn.Parameter(v.clone()) for a, v in begin.items()})

    def forward(self) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for a in self.stems:
            h = torch.relu(self.E @ self.first[a])
            rows = self.base[a] + h @ self.second[a] / h.shape[1] ** 0.5
            out |= {f"{a}{i + 1}": row for i, row in enumerate(rows)}
        return out


def _check(s: DETEX, pictures: Sequence[Any], masks: Sequence[Any]) -> None:
    asked = f"learn {s.word!r}"
    fits = len(pictures) == len(masks) and all(
        np.shape(m) == np.shape(x)[:2] and np.any(m) for x, m in zip(pictures, masks, strict=True)
    )
    if not pictures or not fits:
        found = f"{len(pictures)} pictures, {len(masks)} masks"
        raise RunError(asked, found, "pictures [y, x, rgb], and for each where the thing is, [y, x]")
    left = [stem for stem in ("word", *(a for a, _ in s.attributes)) if f"{{{stem}}}" not in s.full]
    if left or "{word}" not in s.caption:
        found = f"captions {s.caption!r}, {s.full!r}" + (f" without {left[0]}" if left else "")
        raise RunError(asked, found, 'captions as "a {word}" and "a {pose} {word} on {ground}"')
