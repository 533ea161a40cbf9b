"""Falls of agreement that are known: planted in scores, in the truth, or not at all; and a real convex model."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from whence.checks.fragility import Fragility, Retrained, Setting, Trained, fragility
from whence.engine.randomness import stream
from whence.errors import RunError
from whence.verdict import REFUTED, SUPPORTED
from whence.worlds.digits import RECIPE, digits, halves

BASE = Setting(1, 16, 1e-2)
FAMILY = [BASE, replace(BASE, depth=0), replace(BASE, depth=3), replace(BASE, width=4), replace(BASE, width=64)]
FAMILY += [replace(BASE, decay=0.0), replace(BASE, decay=1e-3)]


@cache
def sums(seed: int, noise: float) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Effects [query, example], halves, and outputs of two trainings: sums of the kept effects, with noise."""
    dice = stream("fragility test", seed)
    effects = dice.normal(size=(3, 60))
    kept = halves(60, 40, "fragility test")
    whole = (effects @ kept.T).T
    return effects, kept, [whole + noise * whole.std() * dice.normal(size=whole.shape) for _ in range(2)]


def planted(worse: str = "", noisier: str = "", shuffled: bool = False, again: bool = True) -> Any:
    """``train``: scores that err more the further a setting is along ``worse``, of outputs whose own noise does."""

    def far(setting: Setting, axis: str) -> float:
        level = {"depth": setting.depth / 3, "width": setting.width / 64, "decay": 1 - setting.decay / 1e-2}
        return level[axis] if axis else 0.0

    def train(setting: Setting, seed: int) -> Trained:
        effects, kept, (outputs, other) = sums(seed, 0.3 + 1.5 * far(setting, noisier))
        dice = stream("fragility test", "scores", seed, setting)
        scores = effects + 3 * far(setting, worse) * dice.normal(size=effects.shape)
        if shuffled:
            scores = scores[:, dice.permutation(60)]
        return Trained(scores, {"LDS": Retrained(kept, outputs, other if again else None)})

    return train


def words(found: Fragility) -> dict[str, str]:
    return {axis: verdict.word for axis, verdict in found.verdicts["LDS"].items()}


@pytest.mark.parametrize("axis", ["depth", "width", "decay"])
def test_a_fall_that_was_planted_is_supported_and_on_no_other_axis(axis: str) -> None:
    told = words(fragility(FAMILY, planted(worse=axis)))
    assert {a for a, word in told.items() if word == SUPPORTED} == {axis}


def test_shuffled_scores_agree_with_nothing_and_support_no_fall() -> None:
    found = fragility(FAMILY, planted(worse="depth", shuffled=True))
    assert SUPPORTED not in words(found).values()
    assert all(abs(row["agreement"].mean) < 0.15 for row in found.scores["LDS"].values())


def test_scores_as_good_everywhere_are_refuted_to_fall() -> None:
    assert set(words(fragility(FAMILY, planted())).values()) == {REFUTED}


def test_a_rise_is_not_taken_for_a_fall() -> None:
    train = planted(worse="decay")
    rising = fragility(FAMILY, lambda s, seed: train(replace(s, decay=1e-2 - s.decay), seed))
    assert words(rising)["decay"] == REFUTED


def test_what_the_noise_of_training_explains_is_not_supported_where_another_seed_is_at_hand() -> None:
    found = fragility(FAMILY, planted(noisier="depth"))
    verdict = found.verdicts["LDS"]["depth"]
    assert verdict.effect > 0.2
    assert verdict.word != SUPPORTED
    assert verdict.details["control_name"] == "noise of training"
    assert words(fragility(FAMILY, planted(noisier="depth", again=False)))["depth"] == SUPPORTED


@cache
def linear() -> Any:
    """A convex model of digits with weight decay."""
    return replace(digits(150, 20), hidden=(), recipe=replace(RECIPE, steps=100, rate=0.05, decay=1e-2, batch=0))


@cache
def influence(seed: int) -> np.ndarray:
    """Exact influence functions of the linear model, score[query, example]: g_q' (H + decay)^-1 g_i."""
    net = linear().objective(seed).module[0]
    weight = np.concatenate([net.weight.detach().numpy(), net.bias.detach().numpy()[:, None]], 1).astype(float)

    def parts(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        x = np.concatenate([x, np.ones((len(x), 1))], 1).astype(float)
        odds = np.exp(x @ weight.T)
        odds /= odds.sum(1, keepdims=True)
        return x, odds, np.einsum("nc,nd->ncd", odds - np.eye(10)[y], x).reshape(len(x), -1)

    x, odds, gradients = parts(linear().x, linear().y)
    curvature = np.einsum("nc,ce->nce", odds, np.eye(10)) - odds[:, :, None] * odds[:, None]
    hessian = np.einsum("nce,nd,nf->cdef", curvature, x, x, optimize=True).reshape((weight.size,) * 2) / len(x)
    asked = parts(linear().query_x, linear().query_y)[2]
    return np.asarray(asked @ np.linalg.solve(hessian + 1e-2 * np.eye(weight.size), gradients.T))


@cache
def retrained(seed: int) -> dict[str, Retrained]:
    """On halves, and without single examples."""
    half, alone = halves(150, 32), ~np.eye(150, dtype=bool)[:16]
    outputs = linear().retrained(np.concatenate([half, alone]), [seed])[0]
    return {"LDS": Retrained(half, outputs[:32]), "leave one out": Retrained(alone, outputs[32:])}


def test_influence_agrees_with_training_a_convex_model_again_and_a_broken_scorer_does_not() -> None:
    one = Setting(0, 32, 1e-2)
    pair = [one, replace(one, width=64)]  # a model without hidden layers has no width
    right = fragility(pair, lambda _, seed: Trained(influence(seed), retrained(seed)), seeds=range(2))
    # One that forgets which example a gradient is of.
    wrong = fragility(pair, lambda _, seed: Trained(np.roll(influence(seed), 1, 1), retrained(seed)), seeds=range(2))
    least = {"LDS": 0.8, "leave one out": 0.7}
    agreed = {t: (right.scores[t][one]["agreement"].mean, wrong.scores[t][one]["agreement"].mean) for t in least}
    assert all(agreed[t][0] > least[t] and abs(agreed[t][1]) < 0.25 for t in least), agreed


def test_the_record_is_plain_and_every_number_has_its_interval() -> None:
    found = fragility(FAMILY, planted(worse="depth"))
    record = json.loads(json.dumps(found.record()))
    assert len(record["settings"]["LDS"]) == len(FAMILY)
    assert {"agreement", "shuffled", "another seed"} < set(record["settings"]["LDS"][0])
    assert record["verdicts"]["LDS"]["depth"]["word"] == SUPPORTED
    text = str(found)
    assert "LDS, depth 3, width 16, decay 0.01: agreement" in text
    assert "the more hidden layers" in text


def test_a_truth_that_only_some_settings_have_is_judged_on_those() -> None:
    train = planted(worse="depth")

    def some(setting: Setting, seed: int) -> Trained:
        trained = train(setting, seed)
        return Trained(trained.scores, trained.truths if setting.width == BASE.width else {})

    found = fragility(FAMILY, some)
    assert set(found.verdicts["LDS"]) == {"depth", "decay"}
    with pytest.raises(RunError, match="all seeds"):
        fragility(FAMILY[:2], lambda s, seed: train(s, seed) if seed else Trained(train(s, 0).scores, {}), range(3))


@pytest.mark.parametrize(
    ("settings", "seeds"),
    [(FAMILY, [0]), ([BASE], range(8)), ([BASE, BASE], range(8)), ([BASE, Setting(0, 8, 0.0)], range(8))],
)
def test_a_family_that_can_tell_nothing_is_refused(settings: list[Setting], seeds: Any) -> None:
    with pytest.raises(RunError, match="one thing alone"):
        fragility(settings, planted(), seeds=seeds)
