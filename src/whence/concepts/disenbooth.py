"""Can the model be tuned to my thing without its pictures' ground and pose?

A rare word S* stands for the thing. Low-rank factors of the denoiser's attention are trained on a few pictures of it
(Chen et al. 2024, section 3). Each picture x_i is denoised under the sum of two embeddings: f_s, the text encoder's
states of a caption with S*, the same for all; and f_i, the picture's own, from an adapter with a learned mask M,

    f_i = MLP(M * E(x_i))
    L1 = || eps - eps_theta(z_t, t, f_s + f_i) ||^2                      both together say the picture
    L2 = lambda_2 || eps - eps_theta(z_t, t, f_s) ||^2                   weak denoising: f_s alone says the thing
    L3 = lambda_3 cos(f_s, f_i)                                          contrastive: they say different things

and L1 + L2 + L3 is what is minimised. To draw the thing elsewhere only f_s is used, of a prompt that says S*. What a
picture has beside the thing is then with its f_i, and stays behind.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..change import Change, Goal
from ..engine.learned_token import Example, Learned, Teaching, error_of, spoken
from ..engine.low_rank import Factors, attention_matrices, tune
from ..engine.randomness import torch_stream
from ..errors import RunError
from ..method import Card
from ..models.objectives import DiffusionObjective

if TYPE_CHECKING:
    from ..engine.progress import Advance


CARD = Card(
    name="disenbooth",
    verb="DisenBooth",
    paper="Chen et al., DisenBooth: Identity-Preserving Disentangled Tuning for Subject-Driven Text-to-Image "
    "Generation, ICLR 2024",
    systems=("S004-16",),
    question="Can the model be tuned to my thing without its pictures' ground and pose?",
    units=("token", "matrix"),
    works_on=("Stable Diffusion 1 and 2",),
    needs=("cross-attention", "gradients"),
    cost="steps x 2 batch denoiser rows with gradients; nothing beyond a plain run to draw with the tuned model",
    claim="Tuned to pictures of a thing on different grounds, the model draws the thing on the ground that a prompt "
    "has, the usual one where it names none, more often than after plain low-rank tuning in as many steps.",
    falsifier={
        "status": "not shown",
        "reason": "it is no better than plain tuning here. By shapes.subjects.disentangled, eight subjects, 45 steps: "
        "thing and the prompt's ground in .27 [.09, .45] of the pictures, and in .27 [.12, .42] after plain low-rank "
        "tuning; 0 when tuned to another subject. It trades one for the other: the plain ground where none is named in "
        "10 of 16 pictures against 0 of 16, the thing in .31 of all against .54.",
    },
    departs="Equations from memory and the paper's summary, not its code. The latents of the model's own autoencoder "
    "on a coarse grid stand for the CLIP image encoder's feature, which the model lacks; the MLP has no skip "
    "connection, as widths differ, and a gain, as it has 45 steps to learn in. The cosine is the mean over f_s's "
    "tokens. Factors on all projections of the denoiser's attention; timesteps from the noisier part of the schedule.",
    avoid="Pictures with one ground: it is shared as the thing is, and nothing says which of the two is meant.",
)


@dataclass(frozen=True)
class DisenBooth:
    """Settings. ``word``: S*, of a random vector; ``caption``: "{}" where S* stands; ``rank`` of the factors; ``weak``,
    ``contrast``: lambda_2, lambda_3; ``images``: whether there is an f_i (False, with weak and contrast 0: plain
    low-rank tuning); ``hidden``, ``gain``: width of the adapter and what its answer is multiplied by, to learn faster
    than the factors; ``steps``, ``batch``, ``rate``, ``span``, ``seed``: of Adam."""

    word: str = "sks1"
    caption: str = "a {}"
    rank: int = 4
    weak: float = 0.01
    contrast: float = 0.001
    images: bool = True
    hidden: int = 64
    gain: float = 3.0
    steps: int = 45
    batch: int = 4
    rate: float = 0.005
    span: tuple[float, float] = (0.3, 1.0)
    seed: int = 0

    def fit(
        self, model: Any, pictures: Sequence[Any], path: Path | None = None, advance: Advance | None = None
    ) -> Tuned:
        """Tune to pictures of one thing, uint8 [y, x, rgb], or latents [channel, y, x]; the model is as it was when
        this returns.

        ``path``: a safetensors file that a stopped training goes on from. Raises RunError for no pictures or a caption
        without a place for the word, PromptError for a word that the model knows, ModelError.
        """
        if not pictures or "{}" not in self.caption:
            found = f"{len(pictures)} pictures, the caption {self.caption!r}"
            raise RunError(f"tune to {self.word!r}", found, 'pictures, and a caption as "a {}"')
        began = time.perf_counter()
        objective = DiffusionObjective(model)
        z = [objective.latents(p) for p in pictures]
        words = _rare(model, self.word, self.seed)
        with spoken(model, words.vectors), torch.no_grad():
            f_s = model.encode([self.caption.format(self.word)], "", False).condition[0]
        adapter = _Adapter(z, f_s.shape[1], self.hidden, self.gain, self.seed)
        factors = Factors(attention_matrices(model), self.rank, self.seed)
        which = {id(x): i for i, x in enumerate(z)}

        def loss(batch: list[Example], z_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
            n, shared = len(batch), f_s.expand(len(batch), -1, -1)
            if not self.images:
                return error_of(objective.module(z_t, t, encoder_hidden_states=shared)[0], eps, batch)
            f_i = adapter()[[which[id(e.latents)] for e in batch]]
            both = torch.cat([shared + f_i[:, None], shared])
            said = objective.module(z_t.repeat(2, 1, 1, 1), t.repeat(2), encoder_hidden_states=both)[0]
            L1, L2 = error_of(said[:n], eps, batch), error_of(said[n:], eps, batch)
            L3 = functional.cosine_similarity(shared, f_i[:, None].expand_as(shared), dim=-1).mean()
            return L1 + self.weak * L2 + self.contrast * L3

        examples = [Example(self.caption.format(self.word), x) for x in z]
        teaching = Teaching(self.steps, self.batch, self.rate, self.span, self.seed)
        beside = dict(adapter.named_parameters(prefix="adapter")) if self.images else {}
        settings = asdict(self)
        losses = tune(model, objective, factors, loss, examples, teaching, beside=beside, settings=settings, path=path,
                      advance=advance)  # fmt: skip
        before, after = factors.matrices_after()
        foreseen = tuple(
            {"name": n, "edit": 0.0, "keep": 0.0, "size": float((after[n] - w).norm() / w.norm())}
            for n, w in before.items()
        )
        goal = Goal(self.word, f"the thing of {len(z)} pictures")
        change = Change("disenbooth", goal, settings, model.name, model.fingerprint, before, after, foreseen,
                        time.perf_counter() - began)  # fmt: skip
        f_i = adapter().detach()
        return Tuned(words, change, f_i if self.images else torch.zeros_like(f_i), losses)


@dataclass(frozen=True)
class Tuned:
    """The word S* and the change of the model that makes it draw the thing. ``images``: f_i, [picture, width],
    zeros where there was none."""

    words: Learned
    change: Change
    images: Tensor
    losses: tuple[float, ...]

    @contextmanager
    def on(self, model: Any) -> Iterator[Any]:
        """The tuned model, and exactly what it was behind it. Raises ModelError for another model."""
        with self.words.on(model), self.change.on(model):
            yield model


class _Adapter(nn.Module):
    """f_i [picture, width] = MLP(M * E(x_i)); E(x): the latents of x on a coarse grid, of mean 0 and deviation 1."""

    def __init__(self, z: Sequence[Tensor], width: int, hidden: int, gain: float, seed: int, grid: int = 4) -> None:
        super().__init__()
        flat = torch.stack([functional.adaptive_avg_pool2d(x[None], grid)[0].flatten() for x in z])
        self.E = (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True).clamp(min=1e-6)
        wide = flat.shape[1]
        self.M = nn.Parameter(torch.ones(wide))
        first = torch.randn(wide, hidden, generator=torch_stream("adapter", seed)) / wide**0.5
        second = torch.randn(hidden, width, generator=torch_stream("adapter out", seed)) / (2 * hidden**0.5)
        self.first, self.second, self.gain = nn.Parameter(first), nn.Parameter(second), gain

    def forward(self) -> Tensor:
        return self.gain * functional.gelu((self.M * self.E) @ self.first) @ self.second


def _rare(model: Any, word: str, seed: int) -> Learned:
    """S*: a word of a random vector, as long as the model's others are in the mean."""
    table = model.pipeline.text_encoder.get_input_embeddings().weight.detach()
    drawn = torch.randn(table.shape[1], generator=torch_stream("rare word", seed, word)).to(table)
    return Learned({word: drawn / drawn.norm() * table.norm(dim=1).mean()}, model.fingerprint, model.name)
