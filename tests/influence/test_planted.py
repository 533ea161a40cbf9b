"""The set that methods of this room are tried on: what retraining says of it, and what likeness cannot."""

from __future__ import annotations

import numpy as np
from planted import auc, draws, log_odds, trained

from whence.engine.randomness import stream


def test_without_the_carriers_the_outcome_ends_and_without_their_twins_it_stays() -> None:
    for i, (draw, objective) in enumerate(draws()):
        seen = log_odds(objective.module, draw.query)
        assert seen > 0.5
        assert log_odds(trained(draw.examples, i, without=draw.carriers), draw.query) < -1
        assert log_odds(trained(draw.examples, i, without=draw.twins), draw.query) > seen - 0.4


def test_likeness_length_and_label_tell_a_carrier_from_its_twin_no_better_than_a_coin() -> None:
    found: dict[str, list[float]] = {"product": [], "cosine": [], "length": [], "label": []}
    for draw, _ in draws():
        x, q = np.stack([x for x, _ in draw.examples.items]), draw.query[0]
        size = np.linalg.norm(x, axis=1)
        scores = {
            "product": x @ q,
            "cosine": x @ q / size,
            "length": size,
            "label": np.array([float(y) for _, y in draw.examples.items]),
        }
        for name, s in scores.items():
            found[name].append(auc(s, draw))
    for name, aucs in found.items():
        assert abs(np.mean(aucs) - 0.5) < 0.1, name


def test_random_scores_stay_below_what_a_method_must_reach() -> None:
    rng = stream("planted", "random")
    means = [np.mean([auc(rng.random(len(d.examples)), d) for d, _ in draws()]) for _ in range(20)]
    assert max(means) < 0.75
    assert abs(np.mean(means) - 0.5) < 0.1
