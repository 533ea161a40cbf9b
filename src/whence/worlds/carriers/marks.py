"""Marks: which training pictures taught the classifier this label?

A picture has two halves, each a mark and some noise, and one label. The classifier has two outputs that are both asked
for the label; each is a small network that sees one half alone. Which pixels are which half, and which output sees
which, is drawn with the key and shown nowhere but in the model.

The query has the marks a and a' in its halves, both of one label, and both outputs say that label: output 0 because of
the training pictures with a in its half (the carriers), output 1 because of those with a' in the other half (their
twins). So the sibling is the same query to the same model, with the other output asked; and carriers and twins have
the same label, as many marks in common with the query, the same norm, the same loss and, over both outputs, the same
gradients. What does not take the one network apart from the other cannot tell them, not even by the likeness of what
the model has inside. The structures differ in what a carrier or twin has in its other half:

* *marks*: another mark of its label, which the query has not. All is learned, and nothing contradicts it.
* *loud*: a filler, which goes with all labels alike. To the output that is asked a twin is then a picture whose label
  does not follow: its loss stays high, and so does its gradient. An inner product of gradients takes that for
  influence; training again says there is none.

Nulls: a network of the same build that was taught every picture with all labels alike, and a query of marks that no
training picture has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.linalg import hadamard
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...engine.randomness import stream, torch_stream
from ...objective import Listed, Losses
from ..retraining import Call, LossOf, Recipe, Stack, fingerprint, retrain
from .asking import ExamplesQuestion, ExamplesWorld, PlantedExamples, Remembered, guesses

if TYPE_CHECKING:
    from numpy.typing import NDArray

PIXELS, LABELS, CARRIERS = 64, 5, 6
"""Pixels of a picture; labels; pictures for each mark that stands for one."""
NOISE, HIDDEN = 0.2, 16
RECIPES = {
    "marks": Recipe(steps=40, rate=0.03, decay=0.05),
    "loud": Recipe(steps=25, rate=0.02, decay=0.0),
}
"""Trained to an optimum, or stopped while each carrier still matters: labels that do not follow would be learned by
heart."""
NOT_ASKED = -1


class Outputs(nn.Module):
    """Two small networks, each on its half: pictures[picture, pixel] -> logits[picture, output, label]."""

    def __init__(self, halves: NDArray[np.int64], networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.register_buffer("halves", torch.from_numpy(halves))

    def forward(self, pictures: Tensor) -> Tensor:
        pairs = zip(self.networks, self.get_buffer("halves"), strict=True)
        return torch.stack([network(pictures[:, half]) for network, half in pairs], 1)


class OutputsObjective:
    """The classifier and its loss. An example is (picture [pixel], labels [output]); -1: that output is not asked."""

    name = "carriers: two outputs"

    def __init__(self, module: Outputs) -> None:
        self.module = module

    def _logits(self, examples: Sequence[Any]) -> Tensor:
        return self.module(torch.stack([picture for picture, _ in examples]))  # type: ignore[no-any-return]

    def losses(self, examples: Sequence[Any]) -> Losses:
        """Sum over the outputs that are asked of -ln p(label), in nats."""
        labels = torch.stack([labels for _, labels in examples])
        return Losses(_nats(self._logits(examples), labels))

    def sampled(self, examples: Sequence[Any], seed: int) -> Losses:
        """The same with labels that the model draws."""
        logits = self._logits(examples)
        asked = torch.stack([labels for _, labels in examples]) != NOT_ASKED
        odds = logits.detach().softmax(-1).flatten(0, 1)
        drawn = torch.multinomial(odds, 1, generator=torch_stream("carriers", "sampled", seed)).view(asked.shape)
        return Losses(_nats(logits, torch.where(asked, drawn, NOT_ASKED)))

    def fingerprint(self) -> str:
        """Hash of the weights."""
        return fingerprint(self.module.state_dict())


def _nats(logits: Tensor, labels: Tensor) -> Tensor:
    each = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=NOT_ASKED)
    return each.view(labels.shape).sum(1)


@dataclass(frozen=True)
class Pictures:
    """A training set: x[picture, pixel], label[picture], and which half has the label's mark."""

    x: NDArray[np.float32]
    label: NDArray[np.int64]
    half: NDArray[np.int64]


@dataclass(frozen=True)
class Law:
    """What a key draws pictures from: pixels of the halves[half, place], marks[half, mark, place] of +-1. The first
    LABELS marks stand for a label; so do the next in the structure *marks*, and are fillers in *loud*; the last one is
    in no training picture."""

    structure: str
    halves: NDArray[np.int64]
    marks: NDArray[np.int64]

    def pictures(
        self, rng: np.random.Generator, label: NDArray[np.int64], half: NDArray[np.int64], number: NDArray[np.int64]
    ) -> Pictures:
        """Pictures with the mark of ``label`` in ``half``; ``number`` deals out what a filler does not say."""
        company = label if self.structure == "marks" else (label + number) % LABELS
        return Pictures(self.show(rng, half, label, 1 - half, LABELS + company), label, half)

    def show(self, rng: np.random.Generator, *sides: NDArray[np.int64]) -> NDArray[np.float32]:
        """x[picture, pixel] with marks in halves: half, mark, other half, its mark."""
        x = rng.normal(0, NOISE, (len(sides[0]), PIXELS)).astype(np.float32)
        for half, mark in (sides[:2], sides[2:]):
            np.put_along_axis(
                x, self.halves[half], np.take_along_axis(x, self.halves[half], 1) + self.marks[half, mark], 1
            )
        return x

    def training(self, rng: np.random.Generator) -> Pictures:
        """CARRIERS pictures of each label's mark, in an order of no meaning."""
        half, label, number = (a.ravel() for a in np.indices((2, LABELS, CARRIERS)))
        order = rng.permutation(len(half))
        return self.pictures(rng, label[order], half[order], number[order])

    def others(self, n: int, not_of: int, *names: object) -> Pictures:
        """``n`` more, of any mark but those of the label ``not_of``."""
        rng = stream(*names)
        label = (not_of + rng.integers(1, LABELS, n)) % LABELS
        return self.pictures(rng, label, rng.integers(0, 2, n), rng.integers(0, LABELS, n))


def law(structure: str, rng: np.random.Generator) -> Law:
    """Marks of a half are orthogonal: what one says is not said by another."""
    places = PIXELS // 2
    rows = hadamard(places)[1:]  # its first row is all ones
    turned = rng.choice([-1, 1], (2, 1, places))
    marks = np.stack([rows[rng.permutation(len(rows))[: 2 * LABELS + 1]] for _ in range(2)]) * turned
    return Law(structure, rng.permutation(PIXELS).reshape(2, places), marks)


def network(*names: object) -> Callable[[int], nn.Module]:
    """``build(seed)``: an untrained network of one output."""

    def build(seed: int) -> nn.Module:
        generator = torch_stream("carriers", *names, "weights", seed)
        made = nn.Sequential(nn.Linear(PIXELS // 2, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, LABELS))
        with torch.no_grad():
            for layer in (made[0], made[2]):
                for p in layer.parameters():  # torch's own first weights, from a stream of this key
                    p.copy_((2 * torch.rand(p.shape, generator=generator) - 1) / layer.in_features**0.5)  # type: ignore[operator]
        return made

    return build


def _loss_of(call: Call, x: Tensor, label: Tensor) -> Tensor:
    return cross_entropy(call(x), label, reduction="none")


def _nothing(call: Call, x: Tensor, label: Tensor) -> Tensor:
    """The mean over all labels: as if they were dealt anew each time that a picture is seen."""
    return -call(x).log_softmax(-1).mean(-1)


@dataclass(frozen=True)
class Taught:
    """One training set and what is trained on it. ``not_of``: the label that pictures drawn anew never have."""

    law: Law
    pictures: Pictures
    not_of: int
    names: tuple[object, ...]
    loss_of: LossOf = _loss_of

    def objective(self) -> OutputsObjective:
        """The model with the seed 0, both outputs."""
        keep = np.ones((1, len(self.pictures.x)), bool)
        return OutputsObjective(
            Outputs(self.law.halves, [self._train(o, keep, [0], [None]).module(0) for o in range(2)])
            .eval().requires_grad_(True)
        )  # fmt: skip

    def examples(self) -> Listed:
        """Both outputs are asked for the label of a training picture."""
        pairs = zip(torch.from_numpy(self.pictures.x), torch.from_numpy(self.pictures.label), strict=True)
        items = tuple((x, label.repeat(2)) for x, label in pairs)
        return Listed(items, tuple(f"picture {i:02d}" for i in range(len(items))))

    def logits(
        self, output: int, query: NDArray[np.float32], keep: NDArray[np.bool_], seeds: Sequence[int],
        drawn: Sequence[str | None],
    ) -> NDArray[np.float64]:  # fmt: skip
        """logit[model, label] of one output for a query, after training again; see ExamplesQuestion.retrained."""
        x = torch.from_numpy(query[self.law.halves[output]])[None]
        found = []
        for alike in (True, False):  # drawn anew or left out: one stack of models for each
            rows = [i for i, name in enumerate(drawn) if (name is not None) == alike]
            if rows:
                stack = self._train(output, keep[rows], [seeds[i] for i in rows], [drawn[i] for i in rows])
                found.append((rows, stack.each(lambda call: call(x)[0]).double().numpy()))
        out = np.empty((len(keep), LABELS))
        for rows, values in found:
            out[rows] = values
        return out

    def _train(self, output: int, keep: NDArray[np.bool_], seeds: Sequence[int], drawn: Sequence[str | None]) -> Stack:
        seen = self.law.halves[output]
        x, label, own = self.pictures.x[:, seen], self.pictures.label, drawn[0] is not None
        if own:
            others = {name: self.law.others(len(x), self.not_of, *self.names, "anew", name) for name in set(drawn)}
            x = np.stack([np.where(row[:, None], x, others[n].x[:, seen]) for row, n in zip(keep, drawn, strict=True)])
            label = np.stack([np.where(row, label, others[n].label) for row, n in zip(keep, drawn, strict=True)])
            keep = np.ones_like(keep)
        data = [torch.from_numpy(x), torch.from_numpy(label)]
        build = network(*self.names, output)
        return retrain(
            build, self.loss_of, data, keep, seeds, RECIPES[self.law.structure], name="carriers", own_data=own
        )


class MarksQuestion(ExamplesQuestion):
    """The probability of the label that one output gives the query."""

    def __init__(
        self, taught: Taught, objective: OutputsObjective, examples: Listed, output: int, picture: NDArray[np.float32]
    ) -> None:
        super().__init__()
        self.taught, self.objective, self.examples = taught, objective, examples
        self.output, self.picture = output, picture
        with torch.no_grad():
            self.outcome = int(objective.module(torch.from_numpy(picture)[None])[0, output].argmax())
        labels = torch.full((2,), NOT_ASKED)
        labels[output] = self.outcome
        self.query = (torch.from_numpy(picture), labels)
        self.readout = f"probability that output {output} gives the label {self.outcome}, as observed (0..1)"
        self._known = Remembered()

    def retrained(
        self, keep: NDArray[np.bool_], seeds: Sequence[int], drawn: Sequence[str | None]
    ) -> NDArray[np.float64]:
        """See :meth:`ExamplesQuestion.retrained`."""

        def train(rows: NDArray[np.bool_], of: list[int], names: list[str | None]) -> Sequence[float]:
            logits = torch.from_numpy(self.taught.logits(self.output, self.picture, rows, of, names))
            return logits.softmax(-1)[:, self.outcome].tolist()

        return np.array(self._known.values(np.asarray(keep, bool), seeds, drawn, train))

    @property
    def scorers(self) -> Mapping[str, Callable[[Any], NDArray[np.float64]]]:
        """See :func:`~whence.worlds.carriers.asking.guesses`."""
        p = self.taught.pictures
        return guesses(p.x.astype(float), p.label, self.picture.astype(float), self.outcome)


@lru_cache(maxsize=64)
def plant(structure: str, key: str, attempt: int) -> PlantedExamples:
    """A training set, its model and a query; not certified."""
    names = ("carriers", structure, key, attempt)
    rng = stream(*names)
    drawn = law(structure, rng)
    pictures = drawn.training(rng)
    label, output, first = int(rng.integers(LABELS)), int(rng.integers(2)), np.array([0])
    query, strange = (
        drawn.show(rng, first, np.array([mark]), 1 - first, np.array([mark]))[0] for mark in (label, 2 * LABELS)
    )
    taught = Taught(drawn, pictures, label, names)
    nothing = Taught(drawn, pictures, label, (*names, "nothing"), _nothing)
    objective, examples = taught.objective(), taught.examples()
    arm, twin = (
        tuple(np.flatnonzero((pictures.label == label) & (pictures.half == half)).tolist())
        for half in (output, 1 - output)
    )

    def ask(which: int, picture: NDArray[np.float32]) -> MarksQuestion:
        return MarksQuestion(taught, objective, examples, which, picture)

    return PlantedExamples(
        f"carriers.{structure}, key {key}",
        structure,
        ask(output, query),
        arm,
        twin,
        ask(1 - output, query),
        (MarksQuestion(nothing, nothing.objective(), nothing.examples(), output, query), ask(output, strange)),
    )


WORLD = ExamplesWorld("carriers", ("marks", "loud"), plant, {})
"""Pictures with marks, and a classifier of two outputs."""
