"""DataInf: carriers above twins; the mean of inverses by dense numpy; what is left out of C has a bound."""

from __future__ import annotations

import numpy as np
import pytest
from planted import close, found, loss_gradients, rescored, small

from whence.errors import RunError
from whence.influence.datainf import DataInf
from whence.influence.grad_dot import GradDot


def test_examples_that_taught_the_outcome_stand_above_their_twins() -> None:
    aucs = found(DataInf())
    assert np.mean(aucs) >= 0.97
    assert min(aucs) >= 0.9


@pytest.mark.parametrize("share", [0.1, 3.0])
def test_scores_are_by_the_mean_of_the_inverses_of_each_examples_curvature(share: float) -> None:
    objective, examples, queries = small()
    given = DataInf(share).fit(objective, examples).scores(queries)
    rows, asked = loss_gradients(objective, examples.items), loss_gradients(objective, queries)
    total = np.zeros((2, len(examples)))
    for name, g in rows.items():
        d = g.shape[1]
        damping = share * (g**2).sum(1).mean() / d
        inverse = np.mean([np.linalg.inv(np.outer(x, x) + damping * np.eye(d)) for x in g], 0)
        total += asked[name] @ inverse @ g.T
    assert close(given, total, 2e-3)


def test_what_is_left_out_of_a_layer_has_no_eigenvalue_above_one_part_in_r_plus_one() -> None:
    objective, examples, queries = small(60)
    rows, asked = loss_gradients(objective, examples.items), loss_gradients(objective, queries)
    exact = DataInf().fit(objective, examples)
    true = exact.scores(queries)
    for r in (1, 4):
        bound = sum(
            np.linalg.norm(asked[n], axis=1)[:, None] * np.linalg.norm(rows[n], axis=1) / exact.scheme.damping[n]
            for n in rows
        ) / (r + 1)  # fmt: skip
        off = np.abs(DataInf(singular=r).fit(objective, examples).scores(queries) - true)
        assert (off <= bound).all()
        assert off.max() > 1e-4 * np.abs(true).max()


def test_with_much_damping_only_the_inner_product_is_left() -> None:
    objective, examples, queries = small()
    plain = GradDot(layers=("0",)).fit(objective, examples).scores(queries)
    fitted = DataInf(damping=1e4, layers=("0",)).fit(objective, examples)
    assert close(fitted.scores(queries) * fitted.scheme.damping["0"], plain, 5e-3)


def test_scores_do_not_depend_on_the_batch_and_what_was_learned_goes_to_another_process() -> None:
    objective, examples, queries = small()
    method = DataInf(size=3)
    fitted = method.fit(objective, examples)
    given = fitted.scores(queries)
    assert close(rescored(fitted, method.scheme(fitted.bank.shapes), 5, queries), given, 1e-3)
    scheme = method.scheme(fitted.bank.shapes)
    scheme.restore(fitted.scheme.tensors())
    codes = {plane: next(iter(fitted.shelf.blocks(plane)))[1] for plane in fitted.scheme.planes}
    assert np.array_equal(scheme.score(scheme.prepare(fitted.bank.gradients(queries)), codes), given)


def test_no_damping_is_one_clear_error() -> None:
    objective, examples, _ = small()
    with pytest.raises(RunError, match="a damping of 0"):
        DataInf(damping=0.0).fit(objective, examples)
