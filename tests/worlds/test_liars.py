"""Meta-tests: the trial itself is tried. Liars must lose on fresh draws; truth must score, and degrade as it should."""

from functools import cache
from itertools import pairwise
from statistics import fmean

import numpy as np
import pytest

from whence.method import load
from whence.worlds import liars, registry, scorers, trial

FRESH = 16
HONEST = ("leave_one_out", "integrated_gradients", "shapley_sampling")
SINGLE = ("single",)
LIARS = sorted([*scorers.SCORERS, "by heart", "chooser", "confident", "silent"])


@cache
def draws(key=registry.KEY, n=FRESH):
    world = registry.find("twins")
    return [world.draw(k) for k in registry.draws_of(world, n, key)]


def scored(explain, metric, drawn, structures=SINGLE):
    return [trial.try_draw(explain, d, structures).mean(metric, structures) for d in drawn]


@cache
def gallery():
    free = scorers.scorers_for(draws()[0].planted[0].question)
    listed = draws("published before", 6)
    return free | {"by heart": liars.by_heart(listed), "chooser": liars.chooser(), "confident": liars.confident,
                   "silent": liars.silent}  # fmt: skip


@cache
def tried(name, honest=False):
    explain = load(name)().explain if honest else gallery()[name]
    return [trial.try_draw(explain, d, SINGLE) for d in draws()]


def test_the_gallery_is_whole():
    assert sorted(gallery()) == LIARS


@pytest.mark.parametrize("metric", ["auc", "effects"])
@pytest.mark.parametrize("name", LIARS)
def test_every_liar_is_below_every_honest_method_on_fresh_draws(name, metric):
    if (name, metric) == ("chooser", "auc"):
        metric = "effects"  # choosing by real re-renderings does find a single cause; what it foretells gives it away
    lied = [r.mean(metric) for r in tried(name)]
    for method in HONEST:
        found = [r.mean(metric) for r in tried(method, honest=True)]
        gap = np.subtract(found, lied)
        low = gap.mean() - 2.15 * gap.std(ddof=1) / len(gap) ** 0.5
        assert low > 0, f"{name} {fmean(lied):.2f} against {method} {fmean(found):.2f}"


def test_a_liar_that_knows_the_published_worlds_is_right_on_half_of_them_and_nothing_else():
    listed = draws("published before", 6)
    assert fmean(scored(liars.by_heart(listed), "auc", listed)) == 0.5  # the sibling has the same face
    assert abs(fmean(scored(liars.by_heart(listed), "auc", draws())) - 0.5) < 0.2


def right(drawn):
    return liars.truth(p for d in drawn for p in d.planted)


@pytest.mark.parametrize("metric", ["auc", "effects"])
def test_degraded_truth_scores_monotonically_worse(metric):
    drawn, known = draws()[:8], right(draws()[:8])
    structures = ("single", "and", "xor")

    def mean(share):
        values = []
        for repeat in range(6):

            def explain(handle, repeat=repeat):
                return liars.degraded(known[id(handle._question)], share, repeat, *handle.units.labels)

            values += scored(explain, metric, drawn, structures)
        return fmean(values)

    found = [mean(share) for share in (0, 0.1, 0.3, 0.5, 0.7, 0.9)]
    assert all(a > b - 0.02 for a, b in pairwise(found)), found
    assert found[0] - found[-1] > 0.3, found
    if metric == "auc":
        assert found[0] == 1
