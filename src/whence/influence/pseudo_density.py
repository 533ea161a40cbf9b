"""Is this sample ordinary or rare among the real ones, and can I have more of one kind? Pseudo density.

With real samples x_1 ... x_N in the space of a feature extractor and NN_k(x) the k nearest of them (Li et al. 2024):

    rho(x) = c / ( (1/k) sum_{j in NN_k(x)} |x - x_j| ),     c such that its mean over the real samples is 1

(a real sample is no neighbour of itself). Above 1 a sample is more ordinary than the mean, below it rarer. At
inference a generated sample is kept with a probability that hangs on its density and on tau, a quantile of the real:

    towards fidelity:   1 where rho(x) >= tau, else w            towards diversity:   w where rho(x) >= tau, else 1

An example is part of why a sample is ordinary if the sample were rarer without it. Its score is that fall, exactly:
rho(x) - rho(x without x_i), which is nothing for all but the k nearest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.randomness import stream
from ..errors import RunError
from ..method import Card

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..explanation import Explanation
    from ..objective import Examples

CARD = Card(
    name="pseudo_density",
    verb="PseudoDensity",
    paper="Li, Liu, Zhang, Le, Suesstrunk & Salzmann 2024, Controlling the Fidelity and Diversity of Deep Generative "
    "Models via Pseudo Density",
    systems=("S001-02",),
    question="Is this sample ordinary or rare among the real ones, and can I have more of one kind?",
    units=("training example",),
    works_on=("anything that a feature extractor reads",),
    needs=("training examples",),
    cost="the features of all real samples, once; those of a sample and one pass over the real ones for its density",
    claim="Pseudo density orders samples as their true density does; keeping the dense ones raises precision and "
    "lowers recall, keeping the rare ones the other way round.",
    falsifier={
        "trial": "tests/influence/test_pseudo_density.py::test_it_orders_samples_as_their_true_density_does",
        "planted": "samples of known density: a ring of Gaussians, and a mixture fitted to handwritten digits",
        "expect": 0.8,
        "control": "a random score: an interval about 0; keeping at random moves neither precision nor recall",
        "seconds": 10,
    },
    departs="Importance sampling at inference only: the perturbation of a latent code along the density's gradient and "
    "fine-tuning with weighted samples are left out, and so is the small network that the paper trains to foretell "
    "the density; here it is computed. Which neighbours a density hangs on is our addition. The features are given: "
    "the paper's are those of a vision transformer. k is 10 or 20 in the paper's code, 20 here.",
    avoid="Across feature extractors or data sets: densities compare within one. In many dimensions all distances are "
    "much alike, and densities with them: read their order. Copies of one sample among the real ones count as dense. "
    "For diversity where recall is near 1 already: without the common samples it falls.",
)
BLOCK = 2**25
"""Distances that are held at once."""


@dataclass(frozen=True)
class PseudoDensity:
    """``k``: neighbours that a density is the mean of."""

    k: int = 20

    def fit(self, real: Any, examples: Examples | None = None) -> FittedPseudoDensity:
        """``real``: features [example, feature]; ``examples`` name them. Raises RunError."""
        features = _features(real)
        n = len(features)
        if not 1 <= self.k < n:
            raise RunError(
                f"the {self.k} nearest of {n} real samples",
                "too few",
                f"k from 1 to {max(n - 1, 1)}, of two samples or more",
            )
        if examples is not None and len(examples) != n:
            raise RunError(f"{n} rows of features", f"{len(examples)} examples", "one row for each example")
        bare = FittedPseudoDensity(self, features, np.empty(0), 1.0, examples)
        means = np.concatenate([d[:, 1:].mean(1) for _, d in bare.nearest(features, self.k + 1)])
        # Copies among the real samples would have no distance at all, and all of the density.
        floor = 1e-6 * float(np.median(means))
        if not floor > 0:
            raise RunError("densities of the real samples", f"half of them have {self.k} copies", "no copies, larger k")
        density = 1 / np.maximum(means, floor)
        return FittedPseudoDensity(self, features, density / density.mean(), 1 / float(density.mean()), examples, floor)


@dataclass(frozen=True)
class FittedPseudoDensity:
    """``real`` [example, feature], ``densities`` of these among the others, ``scale``: c."""

    settings: PseudoDensity
    real: NDArray[np.float32]
    densities: NDArray[np.float64]
    scale: float
    examples: Examples | None = None
    floor: float = 0.0

    def nearest(self, features: NDArray[np.float32], k: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """(numbers, distances) [sample, k] of the nearest real samples, block by block, the nearest first."""
        rows = max(1, BLOCK // max(len(self.real), k * self.real.shape[1]))
        middle = self.real.mean(0)
        real = self.real - middle  # far from the origin, differences would drown in rounding
        own = (real.astype(np.float64) ** 2).sum(1)
        for at in range(0, len(features), rows):
            x = features[at : at + rows] - middle
            found = np.argpartition(own - 2.0 * (x @ real.T), k - 1, axis=1)[:, :k]
            distances = np.linalg.norm(x[:, None].astype(np.float64) - real[found], axis=2)
            order = np.argsort(distances, axis=1, kind="stable")
            yield np.take_along_axis(found, order, 1), np.take_along_axis(distances, order, 1)

    def _rho(self, means: NDArray[np.float64]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = self.scale / np.maximum(means, self.floor)
        return found

    def density(self, features: Any) -> NDArray[np.float64]:
        """rho of samples [sample, feature]."""
        x = self._checked(features)
        return np.concatenate([self._rho(d.mean(1)) for _, d in self.nearest(x, self.settings.k)])

    def threshold(self, quantile: float = 0.5) -> float:
        """tau: the density that this share of the real samples lies below."""
        return float(np.quantile(self.densities, quantile))

    def accept(
        self, features: Any, towards: str, quantile: float = 0.5, weight: float = 0.1, seed: object = 0
    ) -> NDArray[np.bool_]:
        """Which generated samples to keep, ``towards`` "fidelity" or "diversity"; ``weight``: w."""
        if towards not in ("fidelity", "diversity"):
            raise RunError(f"samples towards {towards!r}", "no such direction", "fidelity, diversity")
        if not (0 <= weight <= 1 and 0 <= quantile <= 1):
            raise RunError(f"a weight of {weight} at the quantile {quantile}", "these are shares", "numbers of 0 to 1")
        rho = self.density(features)
        wanted = (rho >= self.threshold(quantile)) == (towards == "fidelity")
        kept: NDArray[np.bool_] = stream("pseudo density", seed).random(len(rho)) < np.where(wanted, 1.0, weight)
        return kept

    def sample(
        self, generate: Callable[[int], tuple[Sequence[Any], Any]], count: int, towards: str, quantile: float = 0.5,
        weight: float = 0.1, batch: int = 64, most: int = 100, seed: object = 0,
    ) -> list[Any]:  # fmt: skip
        """``count`` samples of a generator that were accepted; ``generate(n)`` gives n samples and their features.
        Raises RunError after ``most`` times ``count`` samples."""
        kept: list[Any] = []
        asked = 0
        while len(kept) < count:
            if asked >= most * count:
                raise RunError(f"{count} samples towards {towards}", f"{len(kept)} of {asked} fit", "a larger weight")
            made, features = generate(batch)
            good = self.accept(features, towards, quantile, weight, (seed, asked))
            kept += [made[int(i)] for i in np.flatnonzero(good)]
            asked += len(made)
        return kept[:count]

    def scores(self, features: Any) -> NDArray[np.float32]:
        """score[sample, example]: how much less dense the sample were without the example."""
        x, k = self._checked(features), self.settings.k
        out = np.zeros((len(x), len(self.real)), np.float32)
        at = 0
        for found, d in self.nearest(x, k + 1):
            total = d[:, :k].sum(1, keepdims=True)
            fall = self._rho(total / k) - self._rho((total - d[:, :k] + d[:, k:]) / k)
            np.put_along_axis(out[at : at + len(d)], found[:, :k], fall.astype(np.float32), 1)
            at += len(d)
        return out

    def explain(self, feature: Any) -> Explanation:
        """Which real samples make one sample (its features) as ordinary as it is."""
        from ..engine.influence import KIND, units_of
        from ..explanation import Cost, Explanation
        from ..objective import Listed

        began = time.monotonic()
        row = np.asarray(feature).reshape(1, -1)
        rho = float(self.density(row)[0])
        share = float((self.densities < rho).mean())
        examples = self.examples or Listed(tuple(range(len(self.real))))
        return Explanation(
            method=CARD.name, units=units_of(examples), scores=self.scores(row)[0], axes=(KIND,),
            readout="pseudo density that the sample would lose without the example", kind="density",
            settings=asdict(self.settings), cost=Cost(0, time.monotonic() - began),
            details={"density": rho, "denser than of the real samples": share},
        )  # fmt: skip

    def _checked(self, features: Any) -> NDArray[np.float32]:
        x = _features(features)
        if x.shape[1] != self.real.shape[1]:
            raise RunError(
                f"the density of {x.shape[1]} features", f"the real samples have {self.real.shape[1]}",
                "features of the same extractor",
            )  # fmt: skip
        return x


def _features(given: Any) -> NDArray[np.float32]:
    x = np.asarray(given, np.float32)
    if x.ndim != 2 or not np.isfinite(x).all():
        found = f"shape {x.shape}" if x.ndim != 2 else "NaN or infinite numbers"
        raise RunError("a density of features", found, "finite numbers [sample, feature]")
    return x
