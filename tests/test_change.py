"""A Change comes off bit for bit, in any safe order, in memory and on disk; it fits one model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from whence.change import Change, Goal
from whence.errors import ModelError, OutputError
from whence.models.loading import load
from whence.models.tiny import tiny

PLACES = ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight",
          "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight")  # fmt: skip


@pytest.fixture
def model() -> Any:
    return load(tiny("sd"))


def weight(model: Any, name: str) -> torch.Tensor:
    owner: Any = model.pipeline
    for part in name.split("."):
        owner = getattr(owner, part)
    return owner


def change(model: Any, *names: str, by: float = 0.1) -> Change:
    before = {n: weight(model, n).detach().clone() for n in names}
    return Change(
        "by_hand", Goal("red", f"blue {by}"), {}, model.name, model.fingerprint, before,
        {n: t + by * torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for n, t in before.items()},
        ({"name": names[0], "edit": 0.1, "keep": 0.2, "size": 0.3},),
    )  # fmt: skip


def test_changes_of_different_matrices_come_off_in_any_order(model: Any) -> None:
    was = {n: weight(model, n).detach().clone() for n in PLACES}
    first, second = (change(model, n) for n in PLACES)
    for order in ((first, second), (second, first)):
        first.apply(model)
        second.apply(model)
        for one in order:
            one.undo(model)
        assert all(torch.equal(weight(model, n), was[n]) for n in PLACES)
    with first.on(model), second.on(model):
        assert not torch.equal(weight(model, PLACES[1]), was[PLACES[1]])
    assert model.fingerprint == first.fingerprint


def test_a_change_on_top_of_another_comes_off_first(model: Any) -> None:
    first = change(model, PLACES[0])
    beside = change(model, PLACES[0], by=0.2)
    first.apply(model)
    with pytest.raises(ModelError, match=r"the change red -> blue 0\.1 edited"):
        beside.apply(model)
    top = change(model, *PLACES, by=0.3)
    top.apply(model)
    with pytest.raises(ModelError, match=r"on top: red -> blue 0.3"):
        first.undo(model)
    top.undo(model)
    first.undo(model)
    assert model.fingerprint == first.fingerprint
    with pytest.raises(ModelError, match="does not hold"):
        first.undo(model)


def test_signed_zeros_and_infinities_come_back_as_they_were(model: Any) -> None:
    w = weight(model, PLACES[0])
    with torch.no_grad():
        w[0, 0], w[0, 1] = -0.0, float("inf")
    was = w.detach().numpy().tobytes()
    with change(model, PLACES[0]).on(model):
        assert w.detach().numpy().tobytes() != was
    assert w.detach().numpy().tobytes() == was


def test_it_survives_the_disk(model: Any, tmp_path: Path) -> None:
    made = change(model, *PLACES)
    path = made.save(tmp_path / "out")
    assert path == tmp_path / "out" / "change.safetensors"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    again = Change.load(tmp_path / "out")
    assert again.record() == made.record()
    assert json.loads(json.dumps(again.entry("apply", "x")))["goal"] == "red -> blue 0.1"
    with again.on(model):
        assert torch.equal(weight(model, PLACES[0]), made.after[PLACES[0]])
    bad = bytearray(path.read_bytes())
    bad[-3] ^= 1
    path.write_bytes(bad)
    with pytest.raises(ModelError, match="not those that were saved"):
        Change.load(path)
    with pytest.raises(ModelError, match="no such file"):
        Change.load(tmp_path / "none.safetensors")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        made.save(tmp_path / "file" / "x")


def test_another_models_change_is_refused_with_both_fingerprints(model: Any) -> None:
    made = change(model, PLACES[0])
    other = load(tiny("sd"))
    with torch.no_grad():
        weight(other, PLACES[1]).add_(1)
    with pytest.raises(ModelError) as error:
        made.apply(other)
    assert made.fingerprint in str(error.value)
    assert other.fingerprint in str(error.value)
    with pytest.raises(ModelError, match="has none"):
        made.apply(load(tiny("pixart")))
    half = load(tiny("sd"))
    half.pipeline.unet.half()
    with pytest.raises(ModelError, match="same precision"):
        made.apply(half)
