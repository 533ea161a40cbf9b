"""Steering on the tape: both objects come onto the picture, a push elsewhere does not bring them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import whence
from whence.edits.a_star import AStar, retention, segregation
from whence.edits.attend_and_excite import AttendAndExcite, _smooth
from whence.engine.attention import AttentionTape
from whence.errors import MethodError, RunError
from whence.models.steering import Instant, numbers_of
from whence.run import Run, Settings
from whence.worlds.shapes.both import PROMPTS, present, random_direction

PROMPT, ONE, OTHER = PROMPTS[-1]
SEEDS = range(20, 23)


@cache
def model() -> Any:
    return whence.load()


def settings(seed: int, prompt: str = PROMPT, steps: int | None = None) -> Settings:
    return Settings(prompt, seed, steps or model().steps, model().guidance, 64, 64)


def same(a: list[Run], b: list[Run]) -> bool:
    return all((x.latents == y.latents).all() and (x.images == y.images).all() for x, y in zip(a, b, strict=True))


def test_both_objects_come_onto_pictures_that_lacked_one_and_a_random_push_of_that_length_does_not_bring_them() -> None:
    many = [settings(s) for s in SEEDS]
    plain = model().generate_many(many)
    star = AStar(words=(ONE, OTHER))
    steered = star.steer(model(), many)
    pushed = model().generate_many(many, steer=random_direction(star.steering(model()), PROMPT))
    rates = [np.mean([present(r) for r in runs]) for runs in (plain, steered, pushed)]
    assert rates[1] >= rates[0] + 0.4
    assert rates[1] >= rates[2] + 0.4


@pytest.mark.parametrize("method", [AStar(words=(ONE, OTHER)), AttendAndExcite(words=(ONE, OTHER))])
def test_a_step_lowers_the_loss_of_the_maps_it_was_taken_from(method: Any) -> None:
    steer, overlaps = method.steering(model()), []

    def watch(now: Instant) -> torch.Tensor | None:
        z = now.latents.clone()
        new = steer(now)
        if now.step == 0 and new is not None:
            places = numbers_of(model(), PROMPT, method.words)
            for latents in (z, z + 0.05 * (new - z)):
                a = now.maps(latents).detach()[:, places]
                overlap = segregation(a / a.amax((-1, -2), keepdim=True))
                shares = (100 * now.maps(latents).detach()).softmax(1)[:, places]
                overlaps.append(float(overlap if isinstance(method, AStar) else -_smooth(shares).amax((-1, -2)).amin()))
        return new

    model().generate_many([settings(3, steps=2)], steer=watch)
    assert overlaps[1] < overlaps[0]


def test_a_steer_that_changes_nothing_changes_no_bit() -> None:
    many = [settings(s, steps=4) for s in (1, 2)]
    plain = model().generate_many(many)
    assert same(plain, model().generate_many(many, steer=lambda now: None))
    assert same(plain, model().generate_many(many, steer=lambda now: now.latents.clone()))
    seen: list[tuple[int, int]] = []
    model().generate_many(many, steer=lambda now: seen.append((now.step, now.steps)))
    assert seen == [(i, 4) for i in range(4)]


def test_pictures_of_a_batch_are_steered_as_they_are_alone() -> None:
    star = AStar(words=(ONE, OTHER))
    many = [settings(s, steps=4) for s in (1, 2)] + [settings(5, "a green cross and a small green circle", steps=4)]
    star = AStar(words=("cross", "circle"))
    together = star.steer(model(), many)
    alone = [star.steer(model(), [s])[0] for s in many]
    for a, b in zip(together, alone, strict=True):
        assert np.abs(a.latents - b.latents).max() < 1e-3


def test_hooks_and_the_scheduler_are_as_they_were_also_after_an_error() -> None:
    def fails(now: Instant) -> None:
        if now.step == 1:
            raise ValueError("in the midst")

    own = model().pipeline.scheduler.step
    before = len(model().denoiser._forward_pre_hooks)
    with pytest.raises(ValueError, match="in the midst"):
        model().generate_many([settings(1, steps=4)], steer=fails)
    assert model().pipeline.scheduler.step == own
    assert "step" not in vars(model().pipeline.scheduler)
    assert len(model().denoiser._forward_pre_hooks) == before


def test_the_losses_are_those_of_the_equations() -> None:
    a = torch.tensor([[[[1.0, 0.0], [0.5, 0.0]], [[0.0, 1.0], [0.5, 0.0]]]])
    assert segregation(a).tolist() == pytest.approx([0.5 / 3.0])
    b = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]]]])
    assert retention(a, b).tolist() == pytest.approx([(1 - 1.5 / 3.5) + (1 - 1.0 / 2.5)])
    apart = torch.eye(2).reshape(1, 2, 1, 2)
    assert segregation(apart).tolist() == [0.0]


@pytest.mark.parametrize(
    ("words", "says"),
    [(("circle",), "two words or more"), (("circle", "dog"), "does not stand there"), (("a", "circle"), "2 times"),
     ((0, 99), "7 words")],
)  # fmt: skip
def test_words_that_are_not_there_once_are_refused_before_any_work(words: tuple[Any, ...], says: str) -> None:
    with pytest.raises(MethodError) as caught:
        AStar(words=words).steer(model(), [settings(1)])
    assert says in f"{caught.value.found} {caught.value.would_work}"


def test_a_tape_over_a_steered_run_and_a_grid_that_is_not_there_are_refused() -> None:
    with pytest.raises(RunError, match="would be recorded"):
        model().generate_many([settings(1)], AttentionTape(), steer=lambda now: None)
    with pytest.raises(RunError, match="no layer has one"):
        AStar(words=(ONE, OTHER), size=5).steer(model(), [settings(1, steps=2)])
    assert "step" not in vars(model().pipeline.scheduler)
