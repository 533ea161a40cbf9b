"""NoiseCLR: directions that do the same to all pictures are found where they are planted, and applied exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from whence.engine.randomness import stream, torch_stream
from whence.errors import MethodError, RunError
from whence.latents.noiseclr import Directions, NoiseCLR, changes, contrast
from whence.run import Settings
from whence.verbs import load
from whence.worlds.shapes.directions import changed, name_of, one_at_a_time
from whence.worlds.shapes.oracle import read
from whence.worlds.shapes.scenes import Scene, Thing, draw_scene, render

HALF = 8


def planted(x: torch.Tensor, at: torch.Tensor, condition: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
    """A denoiser that does with the first HALF features of a condition the same to every picture, and with the others
    something that depends on the picture."""
    c = condition.mean(1)
    same, own = c[:, :HALF], c[:, HALF:] * x.flatten(1)[:, :HALF].sign()
    return ((torch.cat([same, own], 1)).view(len(x), 1, 4, 4),)


def test_what_is_done_to_all_pictures_alike_is_found() -> None:
    g = torch_stream("planted denoiser")
    x, none = torch.randn(6, 1, 4, 4, generator=g), torch.zeros(2, 2 * HALF)
    start = torch.randn(4, 2, 2 * HALF, generator=g)
    d = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([d], lr=0.05)
    for _ in range(150):
        loss = contrast(changes(planted, x, 0, none, d), 0.5)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    def on_planted(v: torch.Tensor) -> float:
        m = v.mean(1)
        return float((m[:, :HALF].norm(dim=1) / m.norm(dim=1)).mean())

    assert on_planted(d.detach()) > 0.95
    assert on_planted(start) < 0.9  # random directions: about .7
    unit = torch.nn.functional.normalize(d.detach().mean(1), dim=-1)
    assert (unit @ unit.T - torch.eye(4)).max() < 0.2  # no two are one


def test_the_loss_is_the_papers() -> None:
    D, tau = torch.randn(3, 4, 5, generator=torch_stream("D")), 0.7

    def sim(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(torch.exp(torch.cosine_similarity(a, b, dim=0) / tau))

    values = []
    for k in range(3):
        same = sum(sim(D[k, a], D[k, b]) for a in range(4) for b in range(4) if a != b)
        other = sum(sim(D[k, n], D[j, n]) for n in range(4) for j in range(3) if j != k)
        values.append(-np.log(same / other))
    assert float(contrast(D, tau)) == pytest.approx(np.mean(values), abs=1e-5)


@pytest.fixture(scope="module")
def model() -> Any:
    return load()


@pytest.fixture(scope="module")
def found(model: Any) -> Directions:
    return NoiseCLR(directions=2, pictures=2, steps=2).fit(model, [render(draw_scene(i))[0] for i in range(3)])


def test_a_stopped_training_goes_on_to_the_same_directions(model: Any, found: Directions, tmp_path: Path) -> None:
    def stop(n: int = 1, note: str = "") -> None:
        raise KeyboardInterrupt

    pictures, path = [render(draw_scene(i))[0] for i in range(3)], tmp_path / "d.safetensors"
    method = NoiseCLR(directions=2, pictures=2, steps=2)
    from whence.engine import descent

    descent.SAVED, before = -1.0, descent.SAVED
    try:
        with pytest.raises(KeyboardInterrupt):
            method.fit(model, pictures, path, stop)
    finally:
        descent.SAVED = before
    again = method.fit(model, pictures, path)
    assert torch.equal(again.d, found.d)
    assert again.losses == pytest.approx(found.losses)
    with pytest.raises(RunError, match="other settings"):
        replace(method, rate=0.2).fit(model, pictures, path)
    assert all(p.requires_grad for p in model.denoiser.parameters())


def settings(seed: int, guidance: float = 2.0) -> Settings:
    return Settings("a red circle", seed, 2, guidance, 64, 64)


def test_directions_are_applied_exactly_and_leave_nothing_behind(model: Any, found: Directions) -> None:
    plain = model.generate_many([settings(1), settings(2)])
    mixed = found.apply([settings(1), settings(2)], [{}, {0: 1.5, 1: -1.0}])
    assert np.abs(mixed[0].latents - plain[0].latents).max() < 1e-5
    assert np.abs(mixed[1].latents - plain[1].latents).max() > 1e-2
    turned = found.apply([settings(2), settings(1)], [{0: 1.5, 1: -1.0}, {}], batch=1)
    assert np.abs(turned[0].latents - mixed[1].latents).max() < 1e-4
    # an embedding of the prompt in the direction's place is guidance itself: (g - 1) more of it
    own = model.encode(["a red circle"], "", False).condition[0]
    asked = Directions(model, found.none, (own - found.none)[None], {})
    one = asked.apply([settings(1)], [{0: 1.0}])[0]
    assert np.abs(one.latents - model.generate(settings(1, 3.0)).latents).max() < 1e-4
    unguided = asked.apply([settings(1, 1.0)], [{0: 1.0}])[0]
    assert np.abs(unguided.latents - plain[0].latents).max() < 1e-4
    with pytest.raises(RunError, match="there are 2"):
        found.apply([settings(1)], [{5: 1.0}])
    with pytest.raises(RunError, match="kinds of settings"):
        found.apply([settings(1), settings(1, 1.0)], [{}, {}])
    assert not model.denoiser._forward_hooks
    assert found.random().d.flatten(1).norm(dim=1).tolist() == pytest.approx(found.d.flatten(1).norm(dim=1).tolist())


def test_settings_that_give_no_contrast_are_refused(model: Any) -> None:
    with pytest.raises(MethodError, match="nothing to contrast"):
        NoiseCLR(directions=1).fit(model, [])


def test_the_world_sees_what_changed_between_two_pictures() -> None:
    thing = Thing("red", "circle", "large", 1, 1, False)
    scene = Scene("one", (thing,), "", "", (), True, None, False, (0, 0))

    def seen(**more: Any) -> Any:
        return read(render(replace(scene, **more))[0])

    assert changed(seen(), seen()) == frozenset()
    assert changed(seen(), seen(background="night")) == {"background"}
    assert changed(seen(), seen(frame=True)) == {"frame"}
    assert changed(seen(), seen(things=(replace(thing, colour="blue"),))) == {"colour"}
    assert changed(seen(), seen(things=(replace(thing, row=2),))) == {"place"}
    assert changed(seen(), seen(things=(thing, replace(thing, colour="blue", row=2)))) == {"number"}


def test_a_direction_of_one_attribute_scores_and_a_random_one_does_not() -> None:
    one, other = frozenset({"frame"}), frozenset({"frame", "colour"})
    assert name_of([one, one, other, frozenset({"mark"})]) == "frame"
    assert one_at_a_time([[one] * 4, [other] * 4]).tolist() == [0.5] * 4
    rng, names = stream("effects"), ["frame", "mark", "place", "size"]
    random = [[frozenset(n for n in names if rng.random() < 0.5) for _ in range(40)] for _ in range(6)]
    assert one_at_a_time(random).mean() < 0.2
