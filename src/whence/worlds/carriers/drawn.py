"""Drawn: which captioned pictures taught the diffusion model to draw this?

The world `marks` turned round: what was a mark is a word of a caption, what was the label is a *sign*, a bright corner
of the picture. The model has two brushes, small denoisers that read the same caption and each draw the picture by
themselves. Each brush hears half of the words; which, and which corner and scene, is drawn with the key and shown
nowhere but in the model. A caption has one word of either half.

The query is what one brush draws for the caption "a b". Brush 0 hears a, and draws the sign because of the pictures
captioned "a d" (the carriers); brush 1 hears b, and draws it because of those captioned "c b" (their twins). So the
sibling is the same caption to the same model, with the other brush asked. To a brush that hears "a" alone the captions
of twins say "c", another word that stands for the sign, and which the query has not. A carrier and its twin are the
same picture, pixel by pixel; their captions are of one length, with one word in common with the query, and a, b, c and
d come as often, at all times with the sign. All other pictures are of the same scene without the sign.

A model that was taught with captions dealt anew, to each draw of noise, is the first null; a caption that stands for
no sign is the second. The denoisers are of the usual schedule (1000 steps, betas from 1e-4 to .02), say the picture
that is under the noise ("sample", in the words of diffusers), and draw by DDIM with classifier-free guidance, pixels
being held to -1..1. The query's loss is asked of the corner alone: the question is what drew the sign there, not what
drew the scene.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ...engine.randomness import stream, torch_stream
from ...errors import RunError
from ...objective import Listed, Losses
from ..retraining import Call, Recipe, Stack, fingerprint, retrain
from .asking import ExamplesQuestion, ExamplesWorld, PlantedExamples, Remembered, guesses

if TYPE_CHECKING:
    from numpy.typing import NDArray

WORDS = (
    "ash", "bay", "cove", "dell", "elm", "fen", "glen", "hill", "isle", "knoll", "lea", "moor", "oak", "pond",
)  # fmt: skip
HEARD = len(WORDS) // 2
"""Words that one brush hears; the first two of them stand for the sign."""
SIDE, CORNER, NOISE = 8, 3, 0.1
PIXELS = SIDE**2
CARRIERS, OTHERS = 8, 72
"""Pictures for each word that stands for the sign; pictures without it."""
TIMES, ROWS, DROP = 1000, 16, 0.15
"""Timesteps of the schedule; draws of timestep and noise for each picture; the share of them without a caption."""
ALPHA = torch.cumprod(1 - torch.linspace(1e-4, 0.02, TIMES, dtype=torch.float64), 0).float()
"""What is left of a picture at each timestep, as in Ho et al. 2020."""
STEPS, GUIDANCE, STARTS = 10, 2.0, 6
"""Steps of DDIM; scale of the guidance; pictures over which the sign is a mean."""
PLACES = 10
"""Timesteps at which an example's loss is taken."""
TEXT, CLOCK, HIDDEN = 12, 8, 48
RECIPE = Recipe(steps=100, rate=0.02, decay=1e-3, batch=80)
"""Held small (decay), so that what each picture adds still matters at the end."""


def clock(t: Tensor) -> Tensor:
    """The timestep as sines and cosines, [row, CLOCK]."""
    angle = t[:, None] / TIMES * torch.pi * 2.0 ** torch.arange(-1, CLOCK // 2 - 1)
    return torch.cat([angle.sin(), angle.cos()], 1)


def noised(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """A picture at timestep t."""
    a = ALPHA[t][:, None]
    return a.sqrt() * x + (1 - a).sqrt() * noise


class Brush(nn.Module):
    """A denoiser: x[row, pixel] under noise, clock[row, CLOCK], words[row, word] -> the picture, [row, pixel]."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(len(WORDS), TEXT, bias=False)
        self.first = nn.Linear(PIXELS + CLOCK + TEXT, HIDDEN)
        self.middle, self.last = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, PIXELS)

    def forward(self, x: Tensor, time: Tensor, words: Tensor) -> Tensor:
        inside = silu(self.first(torch.cat([x, time, self.read(words)], -1)))
        return self.last(silu(self.middle(inside)))  # type: ignore[no-any-return]


def brush(*names: object) -> Callable[[int], nn.Module]:
    """``build(seed)``: an untrained one."""

    def build(seed: int) -> nn.Module:
        generator = torch_stream("drawn", *names, "weights", seed)
        made = Brush()
        with torch.no_grad():
            for name, p in made.named_parameters():
                if name.endswith("bias"):
                    p.zero_()
                else:
                    size = 0.7 if name == "read.weight" else p.shape[1] ** -0.5
                    p.copy_(size * torch.randn(p.shape, generator=generator))
        return made

    return build


def draw(call: Call, words: Tensor, start: Tensor) -> Tensor:
    """DDIM (Song et al. 2021) from start[picture, pixel], with classifier-free guidance: nothing is drawn by chance."""
    at = torch.linspace(TIMES - 1, 0, STEPS + 1).long()
    n, x, clean = len(start), start, start
    both = torch.cat([words.expand(n, -1), torch.zeros(n, len(WORDS))])
    for now, then in zip(at, [*at[1:], at[-1]], strict=True):
        said, plain = call(x.repeat(2, 1), clock(now[None].float()).expand(2 * n, -1), both).chunk(2)
        clean = (plain + GUIDANCE * (said - plain)).clamp(-1, 1)
        noise = (x - ALPHA[now].sqrt() * clean) / (1 - ALPHA[now]).sqrt()
        x = ALPHA[then].sqrt() * clean + (1 - ALPHA[then]).sqrt() * noise
    return clean


class Brushes(nn.Module):
    """Both, each with the words it hears: [row, brush, pixel]."""

    def __init__(self, hears: Tensor, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.register_buffer("hears", hears)

    def forward(self, x: Tensor, time: Tensor, words: Tensor) -> Tensor:
        pairs = zip(self.networks, self.get_buffer("hears"), strict=True)
        return torch.stack([network(x, time, words * hears) for network, hears in pairs], 1)


class BrushesObjective:
    """The model and its loss on a fixed grid of timesteps: a row each, the noise of a place being the same for all.

    An example is (words [word], picture [pixel], asked [brush, pixel]): what of which brush's picture counts, 1 or 0.
    ``output``: "loss", or "squared norm" of what is predicted, as in DiffusionObjective.
    """

    name = "drawn: two brushes"

    def __init__(self, module: Brushes, output: str = "loss") -> None:
        if output not in ("loss", "squared norm"):
            raise RunError(f"gradients of the output {output!r}", "no such output", "loss, squared norm")
        self.module, self.output = module, output
        self.grid = ((torch.arange(PLACES) + 0.5) * TIMES / PLACES).long()
        self.noise = torch.randn(PLACES, PIXELS, generator=torch_stream("drawn", "grid"))

    def of(self, output: str) -> BrushesObjective:
        """The same model with gradients of another output."""
        return BrushesObjective(self.module, output)

    def _said(self, examples: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """What the brushes say [row, brush, pixel], what they should say, and what counts."""
        words, x, asked = (torch.stack(part).repeat_interleave(PLACES, 0) for part in zip(*examples, strict=True))
        t, noise = self.grid.repeat(len(examples)), self.noise.repeat(len(examples), 1)
        return self.module(noised(x, noise, t), clock(t.float()), words), x[:, None], asked

    def _rows(self, value: Tensor, asked: Tensor) -> Losses:
        n = len(value) // PLACES
        owner, stage = torch.arange(n).repeat_interleave(PLACES), torch.arange(PLACES).repeat(n)
        return Losses((value * asked).sum((1, 2)) / (PIXELS * PLACES), owner, stage)

    def losses(self, examples: Sequence[Any]) -> Losses:
        """The squared error, or the squared norm, of what is asked."""
        said, want, asked = self._said(examples)
        return self._rows((said - want) ** 2 if self.output == "loss" else said**2, asked)

    def sampled(self, examples: Sequence[Any], seed: int) -> Losses:
        """Pictures drawn about the prediction with the spread 1, as a squared loss reads as a Gaussian's."""
        said, _, asked = self._said(examples)
        drawn = torch.randn(said.shape, generator=torch_stream("drawn", "sampled", seed))
        return self._rows(2 * drawn * said, asked)

    def fingerprint(self) -> str:
        """Hash of the weights and of the words that each brush hears, and the output."""
        return f"{fingerprint(self.module.state_dict())}-{self.output.replace(' ', '-')}"


@dataclass(frozen=True)
class Captioned:
    """words[picture, word], 1 or 0, and x[picture, pixel]."""

    words: NDArray[np.float32]
    x: NDArray[np.float32]


@dataclass(frozen=True)
class Law:
    """What a key draws pictures from: the scene [pixel], pixels of the sign, and heard[brush, place], words."""

    scene: NDArray[np.float32]
    sign: NDArray[np.int64]
    heard: NDArray[np.int64]

    @property
    def hears(self) -> Tensor:
        """[brush, word], 1 where it hears the word."""
        return torch.from_numpy(np.stack([np.isin(np.arange(len(WORDS)), own) for own in self.heard])).float()

    def caption(self, *places: int) -> NDArray[np.float32]:
        """The word at this place of each brush's."""
        words = np.zeros(len(WORDS), np.float32)
        words[self.heard[[0, 1], list(places)]] = 1
        return words

    def show(self, rng: np.random.Generator, n: int, sign: bool) -> NDArray[np.float32]:
        """x[picture, pixel]."""
        x = np.tile(self.scene, (n, 1))
        x[:, self.sign] = 1 if sign else -1
        return (x + rng.normal(0, NOISE, x.shape)).astype(np.float32)

    def others(self, rng: np.random.Generator, n: int) -> Captioned:
        """Pictures without the sign, of words that do not stand for it, each as often as any."""
        first, second = (2 + rng.permutation(n) % (HEARD - 2) for _ in range(2))
        return Captioned(np.stack(list(map(self.caption, first, second))), self.show(rng, n, sign=False))

    def training(self, rng: np.random.Generator) -> tuple[Captioned, NDArray[np.int64], NDArray[np.int64]]:
        """Pictures in an order of no meaning, and where brush 0's carriers and brush 1's stand, pair by pair."""
        signed, rest = self.show(rng, CARRIERS, sign=True), self.others(rng, OTHERS)
        said = [np.tile(self.caption(*places), (CARRIERS, 1)) for places in ((0, 1), (1, 0))]
        words, x = np.concatenate([*said, rest.words]), np.concatenate([signed, signed, rest.x])
        order = rng.permutation(len(x))
        place = np.argsort(order)
        return Captioned(words[order], x[order]), place[:CARRIERS], place[CARRIERS : 2 * CARRIERS]


def law(rng: np.random.Generator) -> Law:
    """A bar, a pole or a block in the middle, and one of four corners."""
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    scenes = (abs(y) < 1, abs(x) < 1, (abs(x) < 2) & (abs(y) < 2))
    scene = scenes[int(rng.integers(len(scenes)))]
    low, left = rng.choice([-1, 1], 2)
    corner = (y * low > SIDE / 2 - CORNER) & (x * left > SIDE / 2 - CORNER) & ~np.any(scenes, 0)
    words = rng.permutation(len(WORDS)).reshape(2, HEARD)
    return Law(np.where(scene, 1, -1).ravel().astype(np.float32), np.flatnonzero(corner.ravel()), words)


def _loss_of(call: Call, x: Tensor, time: Tensor, words: Tensor, want: Tensor) -> Tensor:
    return (call(x, time, words) - want).square().mean(-1)


@dataclass(frozen=True)
class Taught:
    """One training set and what is trained on it. ``captions`` are drawn by every model, so that the queries of one
    training set need no training of their own. ``dealt``: each draw of noise has the caption of another one."""

    law: Law
    pictures: Captioned
    names: tuple[object, ...]
    captions: tuple[NDArray[np.float32], ...]
    dealt: bool = False
    known: tuple[Remembered, ...] = field(default_factory=lambda: (Remembered(), Remembered()))

    @cached_property
    def objective(self) -> BrushesObjective:
        """The model with the seed 0, both brushes."""
        keep = np.ones((1, len(self.pictures.x)), bool)
        networks = [self._train(b, keep, [0], [None]).module(0) for b in range(2)]
        return BrushesObjective(Brushes(self.law.hears, networks).eval().requires_grad_(True))

    @cached_property
    def examples(self) -> Listed:
        """Of a training picture all pixels are asked, of both brushes."""
        pairs = zip(torch.from_numpy(self.pictures.words), torch.from_numpy(self.pictures.x), strict=True)
        items = tuple((words, x, torch.ones(2, PIXELS)) for words, x in pairs)
        return Listed(items, tuple(f"picture {i:02d}: {spelled(w)}" for i, (w, _, _) in enumerate(items)))

    @property
    def starts(self) -> Tensor:
        """Noise that every model begins from, [picture, pixel]."""
        return torch.randn(STARTS, PIXELS, generator=torch_stream(*self.names[:3], "starts"))

    def sign(self, x: Tensor) -> Tensor:
        """How much of the sign is in pictures, 0..1: from a quarter of the way up to three quarters."""
        return (x[..., torch.from_numpy(self.law.sign)].mean(-1) + 0.5).clamp(0, 1)

    def values(
        self, which: int, keep: NDArray[np.bool_], seeds: Sequence[int], drawn: Sequence[str | None]
    ) -> NDArray[np.float64]:
        """sign[model, caption] of one brush, after training again; see ExamplesQuestion.retrained."""
        start = self.starts
        heard = [torch.from_numpy(words) * self.law.hears[which] for words in self.captions]

        def signs(call: Call) -> Tensor:
            return torch.stack([self.sign(draw(call, words, start)).mean() for words in heard])

        def train(rows: NDArray[np.bool_], of: list[int], names: list[str | None]) -> Sequence[Any]:
            found = np.empty((len(rows), len(heard)))
            for alike in (True, False):  # drawn anew or left out: one stack of models for each
                part = [i for i, name in enumerate(names) if (name is not None) == alike]
                if part:
                    stack = self._train(which, rows[part], [of[i] for i in part], [names[i] for i in part])
                    found[part] = stack.each(signs).double().numpy()
            return list(found)

        return np.array(self.known[which].values(keep, seeds, drawn, train))

    def _train(self, which: int, keep: NDArray[np.bool_], seeds: Sequence[int], drawn: Sequence[str | None]) -> Stack:
        words, x, own = self.pictures.words, self.pictures.x, drawn[0] is not None
        n = len(x)
        if own:
            others = {name: self.law.others(stream(*self.names, "anew", name), n) for name in set(drawn)}
            rows = [(row[:, None], others[name]) for row, name in zip(keep, drawn, strict=True)]
            words = np.stack([np.where(row, words, other.words) for row, other in rows])
            x = np.stack([np.where(row, x, other.x) for row, other in rows])
            keep = np.ones_like(keep)
        generator = torch_stream(*self.names, "rows")
        of = torch.arange(n).repeat_interleave(ROWS)
        # One timestep in each part of the schedule for each picture.
        t = ((torch.rand(n, ROWS, generator=generator) + torch.arange(ROWS)) / ROWS * TIMES).long().flatten()
        noise = torch.randn(n * ROWS, PIXELS, generator=generator)
        heard = torch.from_numpy(words)[..., of, :] * self.law.hears[which]
        if self.dealt:
            heard = heard[..., torch.randperm(n * ROWS, generator=generator), :]
        heard = heard * (torch.rand(n * ROWS, 1, generator=generator) > DROP)
        clean = torch.from_numpy(x)[..., of, :]
        data = [noised(clean, noise, t), clock(t.float()).expand(*clean.shape[:-2], -1, -1), heard, clean]
        return retrain(
            brush(*self.names, which), _loss_of, data, keep[:, of.numpy()], seeds, RECIPE, name="drawn", own_data=own,
            block=32,
        )  # fmt: skip


def spelled(words: Tensor) -> str:
    """A caption; its words in the order of the alphabet, as the model knows no other."""
    return " ".join(WORDS[int(i)] for i in words.nonzero()[:, 0])


class DrawnQuestion(ExamplesQuestion):
    """How much of the sign one brush draws. ``number``: of the caption among those of ``taught``."""

    repeats, seeds = 1, 5

    def __init__(self, taught: Taught, brush: int, number: int = 0) -> None:
        super().__init__()
        self.taught, self.brush, self.number = taught, brush, number
        self.caption = taught.captions[number]
        said = spelled(torch.from_numpy(self.caption))
        self.readout = f"how much of the sign brush {brush} draws for {said!r}, mean of {STARTS} pictures (0..1)"

    # Made when they are first asked for: most training sets that are turned down need none.
    @cached_property
    def objective(self) -> BrushesObjective:  # type: ignore[override]
        """The model, both brushes."""
        return self.taught.objective

    @cached_property
    def examples(self) -> Listed:  # type: ignore[override]
        """The captioned pictures."""
        return self.taught.examples

    @cached_property
    def query(self) -> tuple[Tensor, Tensor, Tensor]:
        """The caption, the picture that the brush draws from the first noise, and its corner."""
        module, words = self.objective.module, torch.from_numpy(self.caption)
        with torch.no_grad():
            (picture,) = draw(
                module.networks[self.brush], words * self.taught.law.hears[self.brush], self.taught.starts[:1]
            )
        asked = torch.zeros(2, PIXELS)
        asked[self.brush, self.taught.law.sign] = 1
        return words, picture, asked

    def retrained(
        self, keep: NDArray[np.bool_], seeds: Sequence[int], drawn: Sequence[str | None]
    ) -> NDArray[np.float64]:
        """See :meth:`ExamplesQuestion.retrained`."""
        return self.taught.values(self.brush, np.asarray(keep, bool), seeds, drawn)[:, self.number]

    @property
    def scorers(self) -> Mapping[str, Callable[[Any], NDArray[np.float64]]]:
        """Likeness of pictures, of captions and of both to the query's; see
        :func:`~whence.worlds.carriers.asking.guesses`."""
        return _guesses(self)


def _guesses(question: Any) -> dict[str, Callable[[Any], NDArray[np.float64]]]:
    """By name, from what a question shows."""
    words, x = (np.stack([e[i].numpy() for e in question.examples.items]).astype(float) for i in range(2))
    caption, picture = (part.numpy().astype(float) for part in question.query[:2])
    signed = (x[:, question.query[2].numpy().any(0)].mean(1) > 0).astype(np.int64)
    # Rounded: equal pictures are equal here, whatever the order of a sum.
    pixels = (x @ picture / np.linalg.norm(x, axis=1) / np.linalg.norm(picture)).round(6)
    return guesses(x.round(6), signed, picture, 1) | {
        "pixels": lambda _: pixels,
        "words in common": lambda _: words @ caption,
        "pixels and words in common": lambda _: pixels + words @ caption,
        "length of the caption": lambda _: words.sum(1),
        "words that come often": lambda _: words @ words.sum(0),
        "captions like the others": lambda _: (words @ words.T).mean(1).round(6),
    }


@lru_cache(maxsize=32)
def plant(structure: str, key: str, attempt: int) -> PlantedExamples:
    """Captioned pictures, their model and a query; not certified."""
    names = ("drawn", structure, key, attempt)
    rng = stream(*names)
    drawn = law(rng)
    pictures, *places = drawn.training(rng)
    taught = Taught(drawn, pictures, names, (drawn.caption(0, 0), drawn.caption(2, 2)))
    nothing = replace(taught, names=(*names, "nothing"), dealt=True, known=(Remembered(), Remembered()))
    arms, asked = [tuple(sorted(p.tolist())) for p in places], int(rng.integers(2))
    return PlantedExamples(
        f"drawn.{structure}, key {key}",
        structure,
        DrawnQuestion(taught, asked),
        arms[asked],
        arms[1 - asked],
        DrawnQuestion(taught, 1 - asked),
        (DrawnQuestion(nothing, asked), DrawnQuestion(taught, asked, 1)),
    )


WORLD = ExamplesWorld("drawn", ("single",), plant, {})
"""Captioned pictures, and a diffusion model of two brushes."""
