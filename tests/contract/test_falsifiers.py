"""Every Card's falsifier: the method reaches what its Card expects, a random and a shuffled explanation do not."""

from __future__ import annotations

import pytest
from falsifying import MEASURED, NAMES, NO_WORLD_ASKS, NOT_SHOWN, OF_TEXT, SHOWN, TESTED, must_fail, must_reach

from whence.method import card_of

HERE = tuple(n for n in SHOWN if n not in OF_TEXT)


def test_no_card_is_left_out() -> None:
    assert sorted((*SHOWN, *NOT_SHOWN, *MEASURED, *TESTED)) == sorted(NAMES)
    for name in TESTED:
        if not card_of(name).module.startswith("whence.checks."):
            assert name in NO_WORLD_ASKS, f"{name} explains, so it needs a trial of a world"


@pytest.mark.parametrize("name", HERE)
def test_the_method_reaches_what_its_card_expects(name: str) -> None:
    must_reach(name)


@pytest.mark.parametrize("control", ["random", "shuffled"])
@pytest.mark.parametrize("name", HERE)
def test_an_explanation_that_knows_nothing_does_not(name: str, control: str) -> None:
    must_fail(name, control)


def test_a_claim_that_is_not_shown_says_why() -> None:
    for name in NOT_SHOWN:
        assert len(card_of(name).falsifier["reason"]) > 20, name
