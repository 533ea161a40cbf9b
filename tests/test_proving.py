"""Proving: rows that can fail, and that say why."""

import pytest

import whence
from whence import proving
from whence.errors import MethodError
from whence.models.loading import load
from whence.models.small_stable_diffusion import build_pipeline
from whence.worlds.shapes import trials
from whence.worlds.shapes.scenes import WORDS


def test_a_model_in_which_no_cause_can_be_certified_is_not_shown_with_the_reason(monkeypatch):
    monkeypatch.setattr(proving, "trial_of", lambda card: trials.twins)
    row = proving.try_method("daam", 1, load(build_pipeline(WORDS, seed=1)))
    assert row["word"] == "not shown"
    assert "1 pictures for the trial shapes.twins" in row["reason"]
    assert "verdict" not in row


def test_a_check_is_tested_and_not_tried():
    row = proving.try_method("swap", 1, model=None)
    assert row["word"] == "tested"
    assert "tests/checks" in row["reason"]


def test_an_unknown_method_is_refused_before_any_model_is_loaded(monkeypatch):
    monkeypatch.setattr("whence.verbs.load", lambda: pytest.fail("loaded"))
    with pytest.raises(MethodError, match="'daam'"):
        proving.prove(["damm"])


def test_the_small_door_opens_on_what_it_names():
    assert {whence.Run.__name__, whence.Verdict.__name__, whence.explain.__name__} == {"Run", "Verdict", "explain"}
    assert all(getattr(whence, name) is not None for name in whence.__all__)
    with pytest.raises(AttributeError, match="no attribute 'utils'"):
        whence.utils  # noqa: B018


def test_settings_that_a_method_lacks_are_named():
    with pytest.raises(MethodError, match="thresh"):
        whence.explain(None, by="daam", thresh=0.1)
