"""Leave-one-out: it finds the planted word, and only by asking the model. (On the trained model: tests/contract.)"""

import numpy as np
import pytest

from whence.ablations.leave_one_out import LeaveOneOut
from whence.errors import MethodError, PromptError
from whence.models import tiny
from whence.models.loading import load


@pytest.fixture(scope="module")
def run():
    return load(tiny.stable_diffusion()).picture("a red circle", seed=3, steps=2)


OTHERS = {"red": ("blue", "green"), "circle": ("square",)}


def test_a_word_replaced_by_itself_changes_nothing_and_by_another_something(run):
    same = LeaveOneOut(alternatives={"red": ("red",)}).explain(run)
    other = LeaveOneOut(alternatives={"red": ("blue",)}).explain(run)
    assert same.map_of("red").max() <= 1 / 255  # one-by-one and batched pictures may round apart
    assert other.map_of("red").mean() > same.map_of("red").mean()


def test_the_map_is_the_mean_absolute_difference_of_the_pictures(run):
    explanation = LeaveOneOut(alternatives=OTHERS).explain(run)
    changes = [
        abs(run.again(prompt=f"a {c} circle").images[0].astype(float) - run.images[0]).mean(-1) / 255
        for c in ("blue", "green")
    ]
    np.testing.assert_allclose(explanation.map_of("red"), np.mean(changes, 0), atol=2 / 255)
    np.testing.assert_allclose(explanation.spread[0], np.std(changes, 0, ddof=1) / len(changes) ** 0.5, atol=2 / 255)
    assert explanation.cost.runs == 3


def test_words_without_an_alternative_are_left_out_and_named(run):
    explanation = LeaveOneOut(alternatives=OTHERS).explain(run)
    assert explanation.units.labels == ("red", "circle")
    assert "a" in explanation.notes[0]


def test_the_batch_size_does_not_matter(run):
    one, many = (LeaveOneOut(alternatives=OTHERS, batch=b).explain(run).scores for b in (1, 16))
    np.testing.assert_allclose(one, many, atol=1.5 / 255)


def test_dropping_is_another_removal_and_says_so(run):
    explanation = LeaveOneOut(removal="drop").explain(run)
    assert explanation.units.labels == run.words.labels
    assert explanation.settings["removal"] == "drop"
    assert explanation.details["prompts"]["red"] == ["a circle"]


def test_what_cannot_be_served_is_refused(run):
    with pytest.raises(MethodError, match="alternatives="):
        LeaveOneOut().explain(run)
    with pytest.raises(MethodError, match="'replace' or 'drop'"):
        LeaveOneOut(removal="zero").explain(run)
    with pytest.raises(PromptError, match="red, circle"):
        LeaveOneOut(alternatives=OTHERS, words=("blue",)).explain(run)
