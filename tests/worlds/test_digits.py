"""The world of digits: retraining is the same however it is dealt out, and gradients foretell what it does."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from whence.checks.lds import score
from whence.engine.randomness import stream
from whence.errors import RunError
from whence.influence.ekfac import EKFAC
from whence.influence.grad_dot import GradDot
from whence.worlds import digits as world
from whence.worlds.digits import RECIPE, Digits, Truth, digits, halves, mnist

MNIST = Path(__file__).parents[3] / "shared" / "data" / "mnist"


@cache
def small() -> Digits:
    return replace(digits(200, 60), hidden=(16,), recipe=replace(RECIPE, steps=80, rate=0.02, batch=50))


@cache
def truth() -> Truth:
    return small().truth(50, 1)


@cache
def short() -> Digits:
    """Trained for fewer steps, where nothing has to be learned well."""
    return replace(small(), recipe=replace(small().recipe, steps=20))


# --- truth -----------------------------------------------------------------------------------------------------------


def test_curvature_foretells_training_again_better_than_gradients_alone_and_shuffled_scores_do_not() -> None:
    own, told = small(), truth()
    objective = own.objective()
    fitted = {"ekfac": EKFAC(), "grad_dot": GradDot()}
    scores = {name: m.fit(objective, own.examples).scores(own.queries) for name, m in fitted.items()}
    scores["shuffled"] = scores["ekfac"][:, stream("digits test").permutation(len(own))]
    found = {name: score(s, told.subsets, told.mean) for name, s in scores.items()}
    assert found["ekfac"].interval[0] > found["grad_dot"].interval[1]
    assert found["grad_dot"].interval[0] > found["shuffled"].interval[1]
    assert found["ekfac"].mean > 0.3
    assert abs(found["shuffled"].mean) < 0.1


def test_a_digit_is_not_recognised_by_a_model_that_never_saw_its_class() -> None:
    own = small()
    keep = np.array([own.y != c for c in range(10)])
    without = own.retrained(keep, [0])[0][own.query_y, np.arange(len(own.query_y))]
    whole = own.retrained(np.ones((1, len(own)), bool), [0])[0, 0]
    assert np.mean(whole > 0) > 0.8
    assert np.mean(without < whole - 2) > 0.9
    assert np.mean(without > 0) < 0.1


def test_what_a_model_says_is_what_its_objective_loses() -> None:
    said = short().retrained(np.ones((1, 200), bool), [3])[0, 0]
    losses = short().objective(3).losses(short().queries).values.detach().double().numpy()
    assert np.allclose(np.log1p(np.exp(-said)), losses, atol=1e-4)


# --- the same, however it is asked ------------------------------------------------------------------------------------


def test_training_again_is_deterministic_and_does_not_depend_on_who_stands_beside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = halves(200, 4, "digits")
    told = short().retrained(kept, [0, 1])
    assert np.array_equal(replace(short()).retrained(kept, [0, 1]), told)
    monkeypatch.setattr(world, "BLOCK", 3)
    assert np.allclose(replace(short()).retrained(kept[::-1], [1, 0])[::-1, ::-1], told, atol=1e-3)
    assert not np.allclose(told[0], told[1], atol=0.1)


def test_halves_are_halves_of_everybody_alike_and_fewer_are_the_first_of_more() -> None:
    kept = halves(200, 400, "digits")
    assert (kept.sum(1) == 100).all()
    assert abs(kept.mean(0) - 0.5).max() < 0.12
    assert len({row.tobytes() for row in kept}) == 400
    assert (halves(200, 30, "digits") == kept[:30]).all()


def test_another_network_is_trained_for_itself_and_not_remembered_from_this_one() -> None:
    keep = np.ones((1, 200), bool)
    said = [replace(short(), hidden=h).retrained(keep, [0]) for h in ((16,), (), (16, 16))]
    assert np.allclose(said[0], short().retrained(keep, [0]), atol=1e-4)
    assert not np.allclose(said[0], said[1], atol=0.1)
    assert not np.allclose(said[0], said[2], atol=0.1)


def test_what_was_kept_in_a_folder_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = replace(digits(40, 10), recipe=replace(RECIPE, steps=5))
    first = own.truth(8, 2, tmp_path)
    assert [p.suffix for p in tmp_path.iterdir()] == [".npz"]
    own.truth(8, 1, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(Digits, "_train", None)
    again = replace(own).truth(8, 2, tmp_path)
    assert np.array_equal(first.outputs, again.outputs)
    assert first.mean.shape == (8, 10)


# --- the pictures -----------------------------------------------------------------------------------------------------


def test_no_query_is_a_training_picture_and_all_classes_are_there() -> None:
    own = digits()
    assert len(own) == 1000
    assert not {x.tobytes() for x in own.query_x} & {x.tobytes() for x in own.x}
    assert set(own.y) == set(range(10))
    assert abs(own.x).max() <= 1
    assert own.examples.label(0) == f"a {own.y[0]}, number 0"
    assert np.array_equal(digits(300, 50).query_x, own.query_x)


def test_more_digits_than_there_are_and_a_folder_without_mnist_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="fewer"):
        digits(1790, 50)
    with pytest.raises(RunError, match=r"train\.npz"):
        mnist(tmp_path)


def test_pictures_of_mnist_are_averaged_and_keep_their_labels(tmp_path: Path) -> None:
    for file, n in (("train.npz", 12), ("test.npz", 5)):
        y = np.arange(n) % 10
        np.savez(tmp_path / file, x=np.repeat(y, 64).reshape(n, 8, 8).astype(np.uint8) * 20, y=y)
    own = mnist(tmp_path, 12, 5)
    assert own.x.shape == (12, 16)
    assert np.allclose(own.x, own.y[:, None] * 20 / 127.5 - 1)
    with pytest.raises(RunError, match="there are 12"):
        mnist(tmp_path, 13, 5)


@pytest.mark.skipif(not (MNIST / "train.npz").is_file(), reason="MNIST is not there: ../shared/data/mnist")
def test_a_network_learns_mnist() -> None:
    own = mnist(MNIST, 600, 100)
    assert own.x.shape == (600, 196)
    said = own.retrained(np.ones((1, 600), bool), [0])[0, 0]
    assert np.mean(said > 0) > 0.75
