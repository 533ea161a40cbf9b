"""Pseudo density: the order of true densities; precision and recall move as the direction says; neighbours' shares."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture

from whence.engine.randomness import seed_of, stream
from whence.errors import RunError
from whence.influence.pseudo_density import PseudoDensity
from whence.objective import Listed
from whence.verdict import t_interval

SEEDS = 12
Draw = Callable[[int, object, float], np.ndarray]
"""``draw(n, name, width)``: n samples; a width above 1 is a generator less exact than the real ones."""


def ring() -> tuple[Draw, Callable[[np.ndarray], np.ndarray]]:
    """Eight Gaussians on a circle, of unlike weight and width."""
    angle = np.arange(8) * np.pi / 4
    middle = 4 * np.stack([np.cos(angle), np.sin(angle)], 1)
    weight, spread = np.arange(1, 9) / 36, np.linspace(0.3, 0.9, 8)

    def draw(n: int, name: object, width: float = 1.0) -> np.ndarray:
        rng = stream("ring", name)
        which = rng.choice(8, n, p=weight)
        return middle[which] + width * spread[which, None] * rng.normal(size=(n, 2))

    def density(x: np.ndarray) -> np.ndarray:
        square = ((x[:, None] - middle) ** 2).sum(2) / spread**2
        return (weight / spread**2 * np.exp(-square / 2)).sum(1)

    return draw, density


@cache
def mixture() -> GaussianMixture:
    """Fitted to handwritten digits of few enough dimensions."""
    x = load_digits().data
    x = x - x.mean(0)
    axes = np.linalg.svd(x, full_matrices=False)[2][:6]
    return GaussianMixture(10, covariance_type="full", random_state=0).fit(x @ axes.T / 8)


def digits() -> tuple[Draw, Callable[[np.ndarray], np.ndarray]]:
    """Samples of a mixture fitted to handwritten digits."""
    fitted = mixture()

    def draw(n: int, name: object, width: float = 1.0) -> np.ndarray:
        rng = stream("digits", name)
        which = rng.choice(10, n, p=fitted.weights_)
        turned = np.einsum("nij,nj->ni", np.linalg.cholesky(fitted.covariances_)[which], rng.normal(size=(n, 6)))
        return np.asarray(fitted.means_[which] + width * turned)

    return draw, lambda x: np.exp(fitted.score_samples(x))


WORLDS = {"ring": ring, "digits": digits}


@pytest.mark.parametrize("world", WORLDS)
def test_it_orders_samples_as_their_true_density_does(world: str) -> None:
    draw, density = WORLDS[world]()
    found, chance = [], []
    for seed in range(SEEDS):
        fitted = PseudoDensity().fit(draw(1000, ("real", seed), 1.0))
        x = draw(400, ("made", seed), 1.2)
        found.append(spearmanr(fitted.density(x), density(x)).statistic)
        chance.append(spearmanr(stream("random", seed).random(400), density(x)).statistic)
    assert np.mean(found) >= 0.8
    assert t_interval(found, 0.05)[0] > 0.75
    low, high = t_interval(chance, 0.05)
    assert low < 0 < high


def precision_and_recall(real: np.ndarray, made: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019): share of the one set within the k-nearest-neighbour
    balls of the other."""

    def within(x: np.ndarray, of: np.ndarray) -> float:
        radius = np.sort(cdist(of, of), 1)[:, k]
        return float((cdist(x, of) <= radius).any(1).mean())

    return within(made, real), within(real, made)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("towards", "width"), [("fidelity", 1.25), ("diversity", 0.7)])
def test_keeping_the_dense_raises_precision_and_lowers_recall_and_the_other_way_round(
    world: str, towards: str, width: float
) -> None:
    # A generator that is not exact has precision to gain; one that misses what is rare has recall to gain.
    draw, _ = WORLDS[world]()
    effect, control = [], []
    for seed in range(SEEDS):
        real, pool = draw(500, ("real", seed), 1.0), draw(3000, ("pool", seed), width)
        plain = precision_and_recall(real, pool[:300])
        kept = PseudoDensity().fit(real).accept(pool, towards, 0.5, 0.05, seed)
        at_random = stream("random", seed).random(len(pool)) < kept.mean()
        for mask, moved in ((kept, effect), (at_random, control)):
            assert mask.sum() >= 300  # as many samples on all sides, or recall would not compare
            moved.append(np.subtract(precision_and_recall(real, pool[mask][:300]), plain))
    sign = 1 if towards == "fidelity" else -1
    for which, up in ((0, sign), (1, -sign)):
        own = [up * float(e[which]) for e in effect]
        beyond = [up * float(e[which] - c[which]) for e, c in zip(effect, control, strict=True)]
        assert t_interval(own, 0.05)[0] > 0
        assert t_interval(beyond, 0.05)[0] > 0
        assert abs(np.mean([c[which] for c in control])) < 0.03


def test_where_recall_has_no_room_the_rare_alone_recall_less() -> None:
    # What `avoid` says: without the common samples the common real ones are not met either.
    draw, _ = ring()
    moved = []
    for seed in range(SEEDS):
        real, pool = draw(500, ("real", seed), 1.0), draw(3000, ("pool", seed), 1.25)
        kept = PseudoDensity().fit(real).accept(pool, "diversity", 0.5, 0.05, seed)
        plain, rare = (precision_and_recall(real, x[:300])[1] for x in (pool, pool[kept]))
        assert plain > 0.95
        moved.append(rare - plain)
    assert t_interval(moved, 0.05)[1] < 0


def by_hand(real: np.ndarray, x: np.ndarray, k: int) -> np.ndarray:
    own = 1 / np.sort(cdist(real, real), 1)[:, 1 : k + 1].mean(1)
    return 1 / np.sort(cdist(x, real), 1)[:, :k].mean(1) / own.mean()


def test_densities_are_the_papers_formula_and_the_real_ones_have_a_mean_of_one() -> None:
    rng = np.random.default_rng(0)
    real, x = rng.normal(size=(80, 5)) + 100, rng.normal(size=(9, 5)) + 100
    fitted = PseudoDensity(k=7).fit(real)
    assert np.allclose(fitted.density(x), by_hand(real, x, 7), rtol=1e-4)
    own = 1 / np.sort(cdist(real, real), 1)[:, 1:8].mean(1)
    assert np.allclose(fitted.densities, own / own.mean(), rtol=1e-4)
    assert fitted.densities.mean() == pytest.approx(1)
    assert (fitted.densities < fitted.threshold(0.3)).mean() == pytest.approx(0.3, abs=0.02)


def test_an_examples_score_is_the_density_that_is_lost_when_it_is_taken_away() -> None:
    rng = np.random.default_rng(1)
    real, x = rng.normal(size=(40, 3)), rng.normal(size=(4, 3))
    fitted = PseudoDensity(k=5).fit(real)
    scores, own = fitted.scores(x), 1 / np.sort(cdist(real, real), 1)[:, 1:6].mean(1)
    for i in range(40):
        without = np.delete(real, i, 0)
        left = 1 / np.sort(cdist(x, without), 1)[:, :5].mean(1) / own.mean()  # c as it was
        assert np.allclose(scores[:, i], fitted.density(x) - left, atol=1e-4)
    assert ((scores > 0).sum(1) == 5).all()


def test_an_explanation_names_the_neighbours_and_says_how_ordinary_the_sample_is() -> None:
    draw, _ = ring()
    real = draw(200, "real", 1.0)
    examples = Listed(tuple(range(200)), tuple(f"point {i}" for i in range(200)))
    explanation = PseudoDensity(k=5).fit(real, examples).explain(real[7] + 1e-3)
    assert explanation.units.names[int(explanation.scores.argmax())] == "point 7"
    assert explanation.details["density"] > 0
    far = PseudoDensity(k=5).fit(real).explain(np.array([50.0, 50.0]))
    assert far.details["denser than of the real samples"] == 0
    assert explanation.details["denser than of the real samples"] > 0


def test_a_generator_is_asked_until_enough_samples_fit() -> None:
    draw, _ = ring()
    fitted, asked = PseudoDensity().fit(draw(500, "real", 1.0)), []

    def generate(n: int) -> tuple[Any, Any]:
        x = draw(n, ("made", len(asked)), 1.3)
        asked.append(n)
        return list(x), x

    kept = fitted.sample(generate, 100, "diversity", quantile=0.2, weight=0.0)
    assert len(kept) == 100
    assert fitted.density(np.stack(kept)).max() < fitted.threshold(0.2)
    assert sum(asked) > 100
    with pytest.raises(RunError, match="100 samples towards fidelity"):
        fitted.sample(lambda n: ([0] * n, np.full((n, 2), 99.0)), 100, "fidelity", weight=0.0, most=3)


def test_densities_depend_neither_on_the_other_samples_nor_on_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    draw, _ = digits()
    real, x = draw(300, "real", 1.0), draw(50, "made", 1.0)
    fitted = PseudoDensity().fit(real)
    together, scores = fitted.density(x), fitted.scores(x)
    monkeypatch.setattr("whence.influence.pseudo_density.BLOCK", 1000)
    again = PseudoDensity().fit(real)
    assert np.allclose(again.density(x), together, rtol=1e-6)
    assert np.allclose(again.scores(x), scores, rtol=1e-4, atol=1e-7)
    assert np.allclose(again.density(x[::-1])[::-1], together, rtol=1e-6)


def test_which_samples_are_kept_hangs_on_the_seed_alone() -> None:
    draw, _ = ring()
    fitted, x = PseudoDensity().fit(draw(200, "real", 1.0)), draw(100, "made", 1.0)
    first = fitted.accept(x, "fidelity", weight=0.3, seed=1)
    assert np.array_equal(first, fitted.accept(x, "fidelity", weight=0.3, seed=1))
    assert not np.array_equal(first, fitted.accept(x, "fidelity", weight=0.3, seed=2))
    dense = fitted.density(x) >= fitted.threshold()
    assert first[dense].all()
    assert not first[~dense].all()


def test_copies_among_the_real_samples_take_no_density_without_end() -> None:
    draw, _ = ring()
    real = draw(200, "real", 1.0)
    real[:30] = real[0]
    fitted = PseudoDensity(k=20).fit(real)
    assert np.isfinite(fitted.densities).all()
    assert np.isfinite(fitted.density(real)).all()
    with pytest.raises(RunError, match="have 20 copies"):
        PseudoDensity(k=20).fit(np.zeros((100, 2)))


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda: PseudoDensity(k=50).fit(np.zeros((50, 2))), "the 50 nearest of 50"),
        (lambda: PseudoDensity().fit(np.full((50, 2), np.nan)), "NaN"),
        (lambda: PseudoDensity().fit(np.zeros(50)), "shape"),
        (lambda: PseudoDensity(2).fit(np.eye(9), Listed(("a",))), "1 examples"),
        (lambda: PseudoDensity(2).fit(np.eye(9)).density(np.eye(3)), "3 features"),
        (lambda: PseudoDensity(2).fit(np.eye(9)).accept(np.eye(9), "up"), "no such direction"),
        (lambda: PseudoDensity(2).fit(np.eye(9)).accept(np.eye(9), "fidelity", weight=2), "shares"),
    ],
)
def test_bad_input_is_one_clear_error(ask: Callable[[], Any], said: str) -> None:
    with pytest.raises(RunError, match=said):
        ask()


def test_worlds_are_drawn_anew_by_name() -> None:
    assert seed_of("ring", 1) != seed_of("ring", 2)
    draw, density = ring()
    assert not np.allclose(draw(5, 1, 1.0), draw(5, 2, 1.0))
    assert (density(draw(5, 1, 1.0)) > 0).all()
