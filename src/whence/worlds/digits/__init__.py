"""Digits: a small classifier of handwritten digits, and what it says after training again on parts of its pictures.

Nothing is planted. Truth is the model itself, trained on a hundred random halves of its training set with two seeds
each, side by side (some ten seconds): what a method foretells of a half's model is held against what that model says
(`checks/lds.py`). The pictures are scikit-learn's own 8x8 digits; :func:`mnist` takes a folder with MNIST's.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from ...engine.randomness import stream, torch_stream
from ...errors import RunError
from ...models.objectives import ClassifierObjective
from ...objective import Listed
from .. import retraining
from ..carriers.asking import Remembered
from ..retraining import Call, Recipe, Stack, retrain

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...engine.progress import Advance

EXAMPLES, QUERIES, CLASSES = 1_000, 50, 10
HIDDEN = (32,)
RECIPE = Recipe(steps=200, rate=0.01, decay=1e-3, batch=100)
SUBSETS, SEEDS = 100, 2
"""Random halves, and trainings on each, of a truth."""
BLOCK = 128
"""Models that are trained side by side."""


def classifier(inputs: int, hidden: Sequence[int], name: str) -> Callable[[int], nn.Module]:
    """``build(seed)``: an untrained network with these hidden layers (none: a linear one)."""

    def build(seed: int) -> nn.Module:
        generator = torch_stream("digits", name, "weights", seed)
        layers: list[nn.Module] = []
        sizes = [inputs, *hidden, CLASSES]
        for into, out in pairwise(sizes):
            layer = nn.Linear(into, out)
            with torch.no_grad():
                for p in layer.parameters():  # torch's own first weights, from a stream of their own
                    p.copy_((2 * torch.rand(p.shape, generator=generator) - 1) / into**0.5)
            layers += [layer, nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    return build


def _loss_of(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(call(x), y, reduction="none")


def log_odds(logits: Tensor, classes: Tensor) -> Tensor:
    """ln p / (1 - p) of the right class, [..., picture]: has no ceiling, so that averages over models make sense."""
    right = one_hot(classes, CLASSES).bool()
    own = torch.where(right, logits, 0.0).sum(-1)
    return own - logits.masked_fill(right, -torch.inf).logsumexp(-1)


@dataclass(frozen=True, eq=False)
class Truth:
    """What retraining says: ``subsets``[subset, example] of those trained on, ``outputs``[seed, subset, query]."""

    subsets: NDArray[np.bool_]
    outputs: NDArray[np.float64]

    @property
    def mean(self) -> NDArray[np.float64]:
        """output[subset, query], mean over seeds."""
        return np.asarray(self.outputs.mean(0))


@dataclass(frozen=True, eq=False)
class Digits:
    """A training set, queries, and how a model is trained on them. x[picture, pixel] is about -1..1.

    ``dataclasses.replace(digits(), hidden=(64, 64))`` is another network for the same pictures."""

    name: str
    x: NDArray[np.float32]
    y: NDArray[np.int64]
    query_x: NDArray[np.float32]
    query_y: NDArray[np.int64]
    hidden: tuple[int, ...] = HIDDEN
    recipe: Recipe = RECIPE
    known: Remembered = field(default_factory=Remembered, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.x)

    @property
    def examples(self) -> Listed:
        """The training set: (picture [pixel], class)."""
        labels = tuple(f"a {y}, number {i}" for i, y in enumerate(self.y))
        return Listed(tuple(zip(self.x, self.y.tolist(), strict=True)), labels)

    @property
    def queries(self) -> list[tuple[NDArray[np.float32], int]]:
        """Pictures that were not trained on, with their right classes."""
        return list(zip(self.query_x, self.query_y.tolist(), strict=True))

    def objective(self, seed: int = 0) -> ClassifierObjective:
        """The model trained on everything with this seed."""
        stack = self._train(np.ones((1, len(self)), bool), [seed])
        return ClassifierObjective(stack.module(0).requires_grad_(True), f"{self.name}, seed {seed}")

    def retrained(
        self,
        subsets: NDArray[np.bool_],
        seeds: Sequence[int],
        folder: Path | None = None,
        advance: Advance | None = None,
    ) -> NDArray[np.float64]:
        """output[seed, subset, query], the log-odds of the right class, after training on subsets[subset, example].
        What was trained once is remembered, and kept in ``folder``, if there is one, for the next time. ``advance``
        counts steps of models."""
        rows = np.asarray(subsets, bool)
        kept = folder / f"digits-{self._fingerprint(rows, seeds)}.npz" if folder else None
        if kept and kept.exists():
            with np.load(kept, allow_pickle=False) as file:
                return np.asarray(file["outputs"])
        x, y = torch.from_numpy(self.query_x), torch.from_numpy(self.query_y)

        def train(keep: NDArray[np.bool_], of: list[int], drawn: list[str | None]) -> Sequence[Any]:
            odds = self._train(keep, of, advance).each(lambda call: log_odds(call(x), y))
            return list(odds.double().numpy())

        of = [seed for seed in seeds for _ in rows]
        told = self.known.values(np.tile(rows, (len(seeds), 1)), of, [None] * len(of), train)
        found = np.array(told).reshape(len(seeds), len(rows), len(y))
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            part = kept.with_suffix(f".{os.getpid()}.part")
            with part.open("wb") as out:
                np.savez(out, outputs=found)
            part.replace(kept)
        return found

    def truth(
        self, subsets: int = SUBSETS, seeds: int = SEEDS, folder: Path | None = None, advance: Advance | None = None
    ) -> Truth:
        """Random halves of the training set, and what the models say that were trained on them."""
        chosen = halves(len(self), subsets, self.name)
        return Truth(chosen, self.retrained(chosen, range(seeds), folder, advance))

    def _fingerprint(self, *more: Any) -> str:
        """Of everything that makes the outputs: the pictures, the training and its code."""
        found = hashlib.sha256(repr((self.name, self.hidden, self.recipe)).encode())
        parts: list[NDArray[Any]] = [self.x, self.y, self.query_x, self.query_y, *(np.asarray(part) for part in more)]
        for part in parts:
            found.update(f"{part.dtype}{part.shape}".encode() + np.ascontiguousarray(part).tobytes())
        for file in (__file__, retraining.__file__):
            found.update(Path(file).read_bytes())
        return found.hexdigest()[:16]

    def _train(self, keep: NDArray[np.bool_], seeds: Sequence[int], advance: Advance | None = None) -> Stack:
        build = classifier(self.x.shape[1], self.hidden, self.name)
        data = [torch.from_numpy(self.x), torch.from_numpy(self.y)]
        return retrain(build, _loss_of, data, keep, seeds, self.recipe, name=self.name, block=BLOCK, advance=advance)


def halves(n: int, count: int, *names: object) -> NDArray[np.bool_]:
    """subset[subset, example]: random halves. Fewer are the first of more."""
    rng = stream("halves", n, *names)
    out = np.zeros((count, n), bool)
    for row in out:
        row[rng.permutation(n)[: n // 2]] = True
    return out


@lru_cache(maxsize=4)
def digits(examples: int = EXAMPLES, queries: int = QUERIES) -> Digits:
    """scikit-learn's 1,797 digits of 8x8 pixels, split at random. Shared: leave its arrays as they are."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = stream("digits", "split").permutation(len(x))
    if examples + queries > len(x):
        raise RunError(f"{examples} digits and {queries} queries", f"there are {len(x)}", "fewer")
    # Queries come from the end, so that more examples leave them as they are.
    mine, asked = order[:examples], order[len(x) - queries :]
    x, y = x.astype(np.float32) / 8 - 1, y.astype(np.int64)
    return Digits("digits", x[mine], y[mine], x[asked], y[asked])


def mnist(folder: Path | str, examples: int = EXAMPLES, queries: int = QUERIES, step: int = 2) -> Digits:
    """MNIST from ``train.npz`` and ``test.npz`` ("x" uint8 [picture, y, x], "y") of a folder, squares of ``step``
    pixels averaged. Raises RunError where they are not there."""
    parts = []
    for file, count in (("train.npz", examples), ("test.npz", queries)):
        path = Path(folder) / file
        if not path.is_file():
            raise RunError(f"MNIST's digits in {folder}", f"no {file}", "a folder with train.npz and test.npz")
        with np.load(path, allow_pickle=False) as found:
            x, y = found["x"], found["y"].astype(np.int64)
        if count > len(x):
            raise RunError(f"{count} pictures of {file}", f"there are {len(x)}", "fewer")
        chosen = stream("mnist", file).permutation(len(x))[:count]
        places = x.shape[1] // step
        small = x[chosen, : places * step, : places * step].astype(np.float32)
        small = small.reshape(count, places, step, places, step).mean((2, 4))
        parts.append((small.reshape(count, -1) / 127.5 - 1, y[chosen]))
    (x, y), (query_x, query_y) = parts
    return Digits("mnist", x, y, query_x, query_y)
