"""TracIn: carriers above twins; the sum over checkpoints by plain autograd; wrong labels by self-influence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from planted import auc, close, draws, found, loss_gradients, planted, rescored, small, trained, whole

from whence.engine.randomness import stream
from whence.errors import RunError
from whence.influence.tracin import TracIn, _Scheme, self_influence
from whence.models.objectives import ClassifierObjective
from whence.objective import Listed


def test_examples_that_taught_the_outcome_stand_above_their_twins() -> None:
    aucs = found(TracIn())
    assert np.mean(aucs) >= 0.95
    assert min(aucs) >= 0.85


def test_several_checkpoints_find_them_too() -> None:
    aucs = []
    for i, (draw, objective) in enumerate(draws()[:4]):
        along = [ClassifierObjective(trained(draw.examples, i, steps=n)) for n in (30, 60)]
        fitted = TracIn(rates=(0.02, 0.02, 0.01)).fit([*along, objective], draw.examples)
        aucs.append(auc(fitted.scores([draw.query])[0], draw))
    assert np.mean(aucs) >= 0.95


def by_hand(checkpoints: Any, rates: Any, examples: Any, queries: Any) -> np.ndarray:
    pairs = [(whole(loss_gradients(c, queries)), whole(loss_gradients(c, examples))) for c in checkpoints]
    return np.sum([rate * asked @ rows.T for rate, (asked, rows) in zip(rates, pairs, strict=True)], 0)


def test_scores_are_the_sum_over_checkpoints_of_rate_times_inner_product_as_autograd_gives_it() -> None:
    _, examples, queries = small()
    checkpoints, rates = [small(seed=s)[0] for s in (5, 6, 7)], (0.5, 0.1, 0.01)
    given = TracIn(rates).fit(checkpoints, examples).scores(queries)
    assert close(given, by_hand(checkpoints, rates, examples.items, queries), 1e-3)
    assert close(TracIn().fit(checkpoints[0], examples).scores(queries),
                 by_hand(checkpoints[:1], (1.0,), examples.items, queries), 1e-3)  # fmt: skip


def test_self_influence_is_the_score_of_an_example_for_itself() -> None:
    _, examples, _ = small()
    checkpoints, rates = [small(seed=s)[0] for s in (5, 6)], (0.5, 0.1)
    fitted = TracIn(rates).fit(checkpoints, examples)
    true = np.diag(by_hand(checkpoints, rates, examples.items, examples.items))
    assert close(self_influence(fitted), true, 2e-3)
    assert close(self_influence(fitted), np.diag(fitted.scores(list(examples.items))), 2e-3)


def test_wrong_labels_have_the_largest_self_influence() -> None:
    draw = planted(9)
    wrong = stream("wrong labels").permutation(len(draw.examples))[:12]
    items = tuple((x, 1 - y if i in wrong else y) for i, (x, y) in enumerate(draw.examples.items))
    examples = Listed(items, draw.examples.labels)
    own = self_influence(TracIn().fit(ClassifierObjective(trained(examples)), examples))
    right = np.setdiff1d(np.arange(len(items)), wrong)
    assert (own[wrong][:, None] > own[right][None]).mean() > 0.9


def test_a_projection_keeps_the_scores_in_the_mean() -> None:
    objective, examples, queries = small()
    true = TracIn().fit(objective, examples).scores(queries)
    projected = np.mean([TracIn(size=3, seed=s).fit(objective, examples).scores(queries) for s in range(60)], 0)
    assert np.corrcoef(projected.ravel(), true.ravel())[0, 1] > 0.95


def test_scores_do_not_depend_on_the_batch() -> None:
    objective, examples, queries = small()
    fitted = TracIn((0.3,)).fit(objective, examples)
    assert close(rescored(fitted, _Scheme(fitted.bank.shapes, (0.3,)), 5, queries), fitted.scores(queries), 1e-3)


def test_layers_can_be_named_and_are_those_of_every_checkpoint() -> None:
    _, examples, queries = small()
    checkpoints = [small(seed=s)[0] for s in (5, 6)]
    fitted = TracIn(layers=("2",)).fit(checkpoints, examples)
    assert [x.name for x in fitted.bank.layers] == ["0.2", "1.2"]
    last = np.sum([
        loss_gradients(c, queries)["2"] @ loss_gradients(c, examples.items)["2"].T for c in checkpoints
    ], 0)  # fmt: skip
    assert close(fitted.scores(queries), last, 1e-3)


def test_rates_that_do_not_pair_and_a_network_named_twice_are_one_clear_error() -> None:
    objective, examples, _ = small()
    with pytest.raises(RunError, match="2 learning rates for 1 checkpoints"):
        TracIn((0.1, 0.2)).fit(objective, examples)
    with pytest.raises(RunError, match="two share one network"):
        TracIn().fit([objective, ClassifierObjective(objective.module)], examples)
    with pytest.raises(RunError, match="0 checkpoints"):
        TracIn().fit([], examples)
