"""The world of drawn pictures: training again does what was planted, and only the model tells carrier from twin."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from whence.engine.gradients import GradientBank
from whence.engine.randomness import stream
from whence.errors import RunError
from whence.influence.d_trak import DTRAK
from whence.objective import Listed
from whence.worlds.carriers import drawn
from whence.worlds.carriers.asking import PlantedExamples
from whence.worlds.carriers.drawn import ALPHA, CARRIERS, STARTS, TIMES, WORLD, draw, plant
from whence.worlds.ground import ENDS, STILL, trouble
from whence.worlds.registry import find
from whence.worlds.trial import auc

KEY = "one"
SEED = 7
"""Of trainings that no certificate has seen."""
MANY = 40


@cache
def planted() -> PlantedExamples:
    (found,) = WORLD.draw(KEY).planted
    assert isinstance(found, PlantedExamples)
    return found


@cache
def visible() -> tuple[PlantedExamples, ...]:
    """Of many keys: nothing is trained before it is asked for."""
    return tuple(plant("single", f"visible {i}", 0) for i in range(MANY))


def found(p: PlantedExamples, scores: Any) -> float:
    return auc(np.asarray(scores, float), p.arm, p.twin)


# --- truth -----------------------------------------------------------------------------------------------------------


def test_without_the_carriers_the_sign_goes_and_without_their_twins_it_stays() -> None:
    assert trouble(planted()) == ""
    for p in (planted(), planted().mirrored()):
        keep = np.ones((3, len(p.question.units)), bool)
        keep[1, list(p.arm)] = keep[2, list(p.twin)] = False
        seen, gone, stays = p.question.retrained(keep, [SEED] * 3, [None] * 3)
        assert seen - gone > ENDS
        assert abs(seen - stays) < STILL


def test_certification_refuses_twins_as_carriers_and_a_null_that_learned_something() -> None:
    p = planted()
    assert "without the carriers" in replace(p, arm=p.twin, twin=p.arm).trouble()
    assert "null" in replace(p, nulls=(p.question,)).trouble()


def test_d_trak_finds_the_carriers_on_both_sides_and_shuffled_scores_do_not() -> None:
    p = planted()
    objective: Any = p.question.objective
    scores = DTRAK().fit(objective.of("squared norm"), p.question.examples).scores([p.question.query, p.sibling.query])
    sides = (p, p.mirrored())
    assert np.mean([found(side, row) for side, row in zip(sides, scores, strict=True)]) >= 0.9
    rng = stream("drawn test", "shuffled")
    mixed = [found(side, rng.permutation(row)) for _ in range(200) for side, row in zip(sides, scores, strict=True)]
    assert abs(np.mean(mixed) - 0.5) < 0.05


# --- what is visible without the model -------------------------------------------------------------------------------


def test_twins_are_their_carriers_pixel_by_pixel_and_each_brush_hears_one_word_of_either() -> None:
    for p in visible():
        question: Any = p.question
        pictures, hears = question.taught.pictures, question.taught.law.hears.numpy()
        arm, twin = list(p.arm), list(p.twin)
        rows = [sorted(map(bytes, pictures.x[which])) for which in (arm, twin)]
        assert rows[0] == rows[1]
        words = pictures.words
        assert (words @ hears.T == 1).all()
        assert len(np.unique(words[arm], axis=0)) == len(np.unique(words[twin], axis=0)) == 1
        assert (words[arm] @ question.caption == 1).all()
        assert (words[twin] @ question.caption == 1).all()
        # Each of the four words comes as often, and only with the sign.
        four = (words[arm[0]] + words[twin[0]]) > 0
        assert words[:, four].sum(0).tolist() == [CARRIERS] * 4
        others = sorted(set(range(len(words))) - set(arm + twin))
        assert not words[others][:, four].any()
        # To the brush that is asked, a carrier says the query's word and a twin another.
        heard = hears[question.brush]
        assert (words[arm] @ (heard * question.caption) == 1).all()
        assert (words[twin] @ (heard * question.caption) == 0).all()


def _corner(question: Any) -> torch.Tensor:
    asked = torch.zeros(2, drawn.PIXELS)
    asked[question.brush, question.taught.law.sign] = 1
    return asked


def test_scorers_that_never_ask_the_model_are_at_chance() -> None:
    values: dict[str, list[float]] = {}
    for p in visible():
        question: Any = p.question
        # A stand-in for the picture that the model draws: the query's own scene with the sign.
        picture = torch.from_numpy(question.taught.law.show(stream("drawn test", p.name), 1, sign=True)[0])
        question.query = (torch.from_numpy(question.caption), picture, _corner(question))
        for name, scorer in (dict(question.scorers) | {"position": lambda q: -np.arange(len(q.units))}).items():
            values.setdefault(name, []).append(found(p, scorer(question)))
    assert {"pixels", "words in common", "pixels and words in common", "length of the caption", "size"} < set(values)
    for name, aucs in values.items():
        assert abs(np.mean(aucs) - 0.5) <= 3 * np.std(aucs) / MANY**0.5 + 1e-9, name
    for name in ("pixels", "words in common", "pixels and words in common", "length of the caption"):
        assert set(values[name]) == {0.5}, name


# --- the model and its objective -------------------------------------------------------------------------------------


def test_every_weight_has_a_gradient_by_example_and_the_other_brush_none_by_the_query() -> None:
    question: Any = planted().question
    bank = GradientBank(question.objective)
    bank.check(question.examples[0])
    bank.check(question.query)
    assert bank.coverage == 1
    for name, g in bank.gradients([question.query]).items():
        assert bool(g.abs().sum() > 0) == name.startswith(f"networks.{question.brush}."), name


def test_losses_have_a_row_for_each_example_and_timestep() -> None:
    question: Any = planted().question
    examples = list(question.examples.items[:3])
    losses = question.objective.losses(examples)
    assert losses.owner.tolist() == sorted(list(range(3)) * drawn.PLACES)
    assert losses.stage.tolist() == list(range(drawn.PLACES)) * 3
    alone = torch.cat([question.objective.losses([e]).values for e in examples])
    assert torch.allclose(losses.values, alone, atol=1e-6)
    with pytest.raises(RunError, match="no such output"):
        question.objective.of("pixels")


def test_the_schedule_and_the_steps_are_those_of_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(
        TIMES, beta_schedule="linear", prediction_type="sample", clip_sample=False, set_alpha_to_one=False
    )
    assert torch.allclose(theirs.alphas_cumprod, ALPHA, rtol=1e-4)
    monkeypatch.setattr(drawn, "STEPS", 9)  # all of one length
    theirs.set_timesteps(9)
    question: Any = planted().question
    brush = question.objective.module.networks[question.brush]
    heard = question.query[0] * question.objective.module.hears[question.brush]
    x = clean = question.taught.starts
    with torch.no_grad():
        for now in range(TIMES - 1, -1, -(TIMES // 9)):
            time = drawn.clock(torch.full((STARTS,), float(now)))
            said, plain = (brush(x, time, words.expand(STARTS, -1)) for words in (heard, 0 * heard))
            clean = (plain + drawn.GUIDANCE * (said - plain)).clamp(-1, 1)
            x = theirs.step(clean, now, x).prev_sample
        assert torch.allclose(draw(brush, heard, question.taught.starts), clean, atol=1e-3)


# --- asking ----------------------------------------------------------------------------------------------------------


def test_the_value_of_the_query_is_what_the_explained_model_draws() -> None:
    question: Any = planted().question
    module, heard = question.objective.module, question.taught.law.hears[question.brush]
    with torch.no_grad():
        pictures = draw(module.networks[question.brush], question.query[0] * heard, question.taught.starts)
    kept = np.ones((1, len(question.units)), bool)
    assert float(question.taught.sign(pictures).mean()) == pytest.approx(float(question.ask(kept)[0]), abs=1e-2)
    assert torch.allclose(pictures[0], question.query[1], atol=1e-5)


def test_the_same_key_gives_the_same_pictures_and_model_and_another_key_others() -> None:
    first: Any = planted().question
    plant.cache_clear()
    again: Any = plant("single", KEY, WORLD.attempts["single", KEY]).question
    other: Any = plant("single", "two", 0).question
    assert first.taught is not again.taught
    assert isinstance(first.examples, Listed)
    assert first.examples.fingerprint() == again.examples.fingerprint() != other.examples.fingerprint()
    assert first.objective.fingerprint() == again.objective.fingerprint()
    assert torch.equal(first.query[1], again.query[1])
    assert find("drawn") is WORLD
