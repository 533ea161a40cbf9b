"""Fine-tuning away from a concept: a step moves the model and leaves it as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from whence.change import Goal
from whence.edits.erase import Erase
from whence.engine import descent
from whence.errors import MethodError, ModelError, RunError
from whence.models.loading import load
from whence.models.tiny import tiny

GOAL = Goal("red", "blue", ("a red circle", "the red cat"), ("green",))
FEW = Erase(steps=2, batch=1, pictures=1, rate=3e-3)


@pytest.mark.parametrize("toward", ["new", "away"])
def test_it_trains_the_keys_and_values_and_gives_the_model_back(toward: str) -> None:
    model = load(tiny("sd"))
    fingerprint = model.fingerprint
    change = replace(FEW, toward=toward).plan(model, GOAL)
    assert model.fingerprint == fingerprint
    assert all("attn2.to_" in n for n in change.before)
    assert all(not torch.equal(change.before[n], change.after[n]) for n in change.before)
    assert all(p.grad is None for p in model.pipeline.unet.parameters())
    if toward == "new":
        assert FEW.plan(model, GOAL).key == change.key


def test_a_stop_on_the_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny("sd"))
    fingerprint = model.fingerprint

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        FEW.plan(model, GOAL)
    assert model.fingerprint == fingerprint


def test_a_stopped_training_goes_on_as_the_whole_one_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = load(tiny("sd")), tmp_path / "erase.safetensors"
    monkeypatch.setattr(descent, "SAVED", 0.0)
    method = replace(FEW, steps=3)
    whole = method.plan(model, GOAL)

    def stop(n: int, note: str = "") -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        method.plan(model, GOAL, path, stop)
    steps: list[int] = []
    again = method.plan(model, GOAL, path, lambda n, note="": steps.append(n))
    assert steps == [1, 1]
    assert again.key == whole.key
    assert method.plan(model, GOAL, path).settings == whole.settings
    with pytest.raises(RunError, match="a training of other settings"):
        replace(method, rate=1e-4).plan(model, GOAL, path)


def test_what_it_cannot_train_is_refused() -> None:
    with pytest.raises(ModelError, match="Stable Diffusion 1 or 2"):
        FEW.plan(load(tiny("sdxl")), GOAL)
    with pytest.raises(MethodError, match="new or away"):
        replace(FEW, toward="up").plan(load(tiny("sd")), GOAL)
