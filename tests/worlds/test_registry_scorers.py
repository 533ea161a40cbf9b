"""Model-free scorers of a world look at the question that they are asked, on every draw."""

from __future__ import annotations

import numpy as np
import pytest

from whence.engine.randomness import stream
from whence.worlds import registry, scorers
from whence.worlds.carriers import marks
from whence.worlds.ground import Draw


@pytest.mark.parametrize("metered", [False, True])
def test_a_draw_is_not_judged_by_the_scores_of_another(metered: bool) -> None:
    from whence.question import Metered

    planted = [marks.plant("marks", f"scorers {i}", 0) for i in range(2)]
    draws = [Draw("carriers", p.name, (p,)) for p in planted]
    asked = registry.model_free(draws)
    for p in planted:
        question = Metered(p.question) if metered else p.question
        for name in ("similarity to the query", "size", "like the other examples"):
            np.testing.assert_array_equal(asked[name](question), p.question.scorers[name](p.question))
    one, other = (asked["similarity to the query"](p.question) for p in planted)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("shape", [(20, 3, 50), (50, 3, 20)])
def test_the_first_component_is_that_of_numpys_decomposition_whichever_side_is_smaller(shape: tuple[int, ...]) -> None:
    x = stream("first component", *shape).normal(size=shape)
    found = scorers._one_number(x)
    for unit in range(shape[1]):
        own = x[:, unit] - x[:, unit].mean(0)
        u, s, _ = np.linalg.svd(own, full_matrices=False)
        assert np.abs(found[:, unit]) == pytest.approx(np.abs(u[:, 0] * s[0]))
