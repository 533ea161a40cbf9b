"""Tokens: a small BERT classifier on sequences of words, with one output for each structure, trained in seconds.

A unit is a word of two forms, one for each state; every sequence has all units, in an order of its own, so that a
state is another word and never a gap. Word embeddings are fixed codes of equal length, orthogonal to each other: the
sibling exchanges the codes of arm and twin, and nothing in an input tells which of them the model learned to read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ...engine.randomness import seed_of, stream
from ...models.small_classifier import attention, build_classifier, logits
from ...units import Units
from ..ground import STRUCTURES, Oracle, Planted
from ..twins.arms import Arms, lay_out
from ..twins.asking import ArmsQuestion, ArmsWorld, exchanged

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..twins.arms import Bools

DISTRACTORS = 2
_CLS, _SEP, _WORDS = 0, 1, 2
_STEPS, _BATCH, _RATE = (300, 900), 48, 4e-3
"""Steps of training, and those of a second one where the first did not learn all structures; sequences of a step."""
_LAST = 15
"""How much faster the last layer learns: it has to become sure, and begins far from it."""
_NULL_STEPS = 60
"""Steps of the network that learns from dealt labels: after that many, its sibling of true labels says a good deal."""
_CHUNK = 256
"""Sequences that go through the model at once."""


class TokensQuestion(ArmsQuestion):
    """The probability of what one output said of one sequence, word embeddings being its input."""

    capabilities = frozenset({"gradients", "attention"})

    def __init__(
        self, made: Made, model: Any, structure: str, seen: Bools, order: NDArray[np.int64],
        reads: NDArray[np.int64], names: tuple[object, ...],
    ) -> None:  # fmt: skip
        """``order[place]`` is the unit of each word, ``reads[unit]`` whose codes stand for it (the sibling's are
        exchanged)."""
        super().__init__(made.arms, made.units(order), seen, *names)
        self._model, self._order = model, torch.from_numpy(order)
        self._output = list(made.arms.arm).index(structure)
        self._sign = 1.0 if made.arms.outcomes(seen)[self._output] else -1.0
        self._codes = model.get_input_embeddings().weight.detach()
        # Codes are orthonormal, so that one matrix puts a code in the place of another: the sibling's are exchanged
        # behind its input, which is the same as that of the question.
        words = np.concatenate([[_CLS, _SEP], (_WORDS + 2 * reads[:, None] + np.arange(2)).ravel()])
        self._exchange = self._codes.T @ self._codes[torch.from_numpy(words)]
        self._exchanged = bool((reads != np.arange(len(reads))).any())
        self.readout = f"probability of the observed outcome of output {self._output} (0..1)"

    def _embed(self, states: Bools) -> Tensor:
        words = _sequence(torch.from_numpy(states), self._order.expand(len(states), -1))
        return nn.functional.embedding(words, self._codes)

    @property
    def inputs(self) -> Tensor:
        """[1, token, width]."""
        return self._embed(self.seen[None])

    @property
    def unit_of(self) -> Tensor:
        """Unit of each entry, [1, token, width]; -1 at both ends."""
        owner = nn.functional.pad(self._order, (1, 1), value=-1)
        return owner[None, :, None].expand(1, -1, self._codes.shape[1]).clone()

    def forward(self, inputs: Tensor) -> Tensor:
        """The readout, [batch, token, width] -> [batch], differentiable."""
        return torch.sigmoid(self._sign * logits(self._model, self._read(inputs))[:, self._output])

    def _read(self, inputs: Tensor) -> Tensor:
        return inputs @ self._exchange if self._exchanged else inputs

    def background(self, n: int) -> Tensor:
        """``n`` sequences drawn from the world in this one's order, [n, token, width]; fewer are the beginning of
        more."""
        drawn = stream(*self.names, "background").standard_normal((n, len(self.units), 2))
        return self._embed(self.arms.render(drawn))

    def attention(self) -> NDArray[np.float64]:
        """mass[unit] of attention, averaged over layers, heads and queries; what both ends get is left out."""
        mass = attention(self._model, self._read(self.inputs))[0].mean((0, 1, 2))[1:-1].double().numpy()
        out = np.empty(len(self.units))
        out[self._order.numpy()] = mass
        return out

    def _values(self, states: Bools, keep: Bools, drawn: NDArray[np.float64]) -> NDArray[np.float64]:
        with torch.no_grad():
            found = [self.forward(self._embed(states[i : i + _CHUNK])) for i in range(0, len(states), _CHUNK)]
        return torch.cat(found).double().numpy()


def _sequence(states: Tensor, order: Tensor) -> Tensor:
    """Word numbers [row, token] of states[row, unit] with the unit order[row, place] at each place."""
    words = _WORDS + 2 * order + states.long().gather(1, order)
    ends = words.new_full((len(words), 1), _CLS), words.new_full((len(words), 1), _SEP)
    return torch.cat([ends[0], words, ends[1]], 1)


@dataclass(frozen=True)
class Made:
    """What a key makes: the trained ``model`` and the nulls."""

    key: str
    arms: Arms
    model: Any
    nulls: tuple[Any, ...]

    def units(self, order: NDArray[np.int64]) -> Units:
        """Each unit and its token in sequences of this order[place]."""
        return Units("word", self.arms.names, tuple(((int(place) + 1,),) for place in np.argsort(order)))

    def plant(self, structure: str, attempt: int, purpose: str = "asking") -> Planted:
        """See :class:`~whence.worlds.twins.asking.Plants`."""
        names = ("tokens", self.key, structure, attempt)
        rng = stream(*names)
        seen = self.arms.asked(structure, rng)
        order = rng.permutation(len(seen))
        arm, twin = self.arms.arm[structure], self.arms.twin[structure]

        def ask(model: Any, reads: NDArray[np.int64]) -> Oracle:
            return TokensQuestion(self, model, structure, seen, order, reads, (*names, purpose))

        as_is = np.arange(len(seen))
        return Planted(
            f"tokens.{structure}, key {self.key}",
            structure,
            ask(self.model, as_is),
            arm,
            twin,
            ask(self.model, exchanged(len(seen), arm, twin)),
            tuple(ask(null, as_is) for null in self.nulls),
        )


def _aids(arms: Arms, states: Bools) -> Bools:
    """What the model is also taught while it learns: the state of each unit that decides something, and which of four
    the states of each pair are. Without the latter no gradient leads to an exclusive or for most of the training."""
    units = [states[:, list(arm)] for arm in arms.arm.values()]
    pairs = [(u[:, :1], u[:, 1:]) for u in units if u.shape[1] == 2]
    return np.concatenate([*units, *(both for a, b in pairs for both in (a & b, a & ~b, ~a & b))], 1)


def _train(arms: Arms, key: str, name: str, steps: int, dealt: bool = False) -> Any:
    """The model after this many steps, on fresh sequences; ``dealt``: its labels go to other rows at every step."""
    rng = stream("tokens", key, "training", name)
    units, outputs = len(arms.names), len(arms.arm)
    aids = _aids(arms, np.zeros((1, units), bool)).shape[1]
    model = build_classifier(_WORDS + 2 * units, units + 2, outputs + aids, seed_of("tokens", key, "weights"))
    if steps:
        last = list(model.classifier.parameters())
        first = [p for p in model.bert.parameters() if p.requires_grad]
        groups = [{"params": first}, {"params": last}]
        optimiser = torch.optim.AdamW(groups, lr=_RATE, betas=(0.9, 0.98), fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, [_RATE, _LAST * _RATE], total_steps=steps, pct_start=0.1, cycle_momentum=False
        )
        table = model.get_input_embeddings().weight
        with torch.enable_grad():
            for _ in range(steps):
                states = arms.training(rng.standard_normal((_BATCH, units, 2), np.float32))
                order = torch.from_numpy(rng.permuted(np.tile(np.arange(units), (_BATCH, 1)), axis=1))
                labels = np.concatenate([arms.lessons(states), _aids(arms, states)], 1, dtype=np.float32)
                labels = labels[rng.permutation(_BATCH)] if dealt else labels
                said = logits(model, table[_sequence(torch.from_numpy(states), order)])
                loss = nn.functional.binary_cross_entropy_with_logits(said, torch.from_numpy(labels))
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_([*first, *last], 1.0)
                optimiser.step()
                schedule.step()
    return model.requires_grad_(False)


def _learned(arms: Arms, key: str, model: Any) -> bool:
    """Whether nearly every output is right, and sure of it, on fresh sequences."""
    rng, units = stream("tokens", key, "check"), len(arms.names)
    states = arms.training(rng.standard_normal((512, units, 2), np.float32))
    order = torch.from_numpy(rng.permuted(np.tile(np.arange(units), (len(states), 1)), axis=1))
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        said = logits(model, table[_sequence(torch.from_numpy(states), order)])[:, : len(arms.arm)].sigmoid().numpy()
    return bool(((abs(said - arms.outcomes(states)) < 0.2).mean(0) >= 0.97).all())


@lru_cache(maxsize=16)
def make(key: str, steps: tuple[int, ...] = _STEPS) -> Made:
    """The world of a key, trained for the first number of ``steps`` that is enough; nothing is certified yet."""
    arms = lay_out(tuple(STRUCTURES), DISTRACTORS, stream("tokens", key, "units"))
    nulls = (_train(arms, key, "untrained", 0), _train(arms, key, "dealt", min(*steps, _NULL_STEPS), dealt=True))
    for n in steps:
        model = _train(arms, key, "trained", n)
        if _learned(arms, key, model):
            break
    return Made(key, arms, model, nulls)


WORLD = ArmsWorld("tokens", make)
"""Sequences of words, and a trained transformer."""
