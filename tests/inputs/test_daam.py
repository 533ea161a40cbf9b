"""DAAM: exact against the sum it is defined as; invariant; refused where it would be wrong. (Truth: tests/contract.)"""

import dataclasses

import numpy as np
import pytest
import torch

import whence
from whence.engine.attention import AttentionTape
from whence.errors import MethodError, WrongMapError
from whence.inputs.daam import DAAM, interaction, region
from whence.models import tiny
from whence.models.loading import load


@pytest.fixture(scope="module")
def model():
    return load(tiny.stable_diffusion())


@pytest.fixture(scope="module")
def run(model):
    return model.picture("a red circle and a red square", seed=3, steps=3)


def test_a_map_is_the_mean_over_heads_layers_and_steps_of_upscaled_clamped_attention(model, run):
    tape = AttentionTape(keep=("step", "layer", "head"))
    model.generate(run.settings, tape=tape)
    height, width = run.latents.shape[2:]
    per_head = []
    for layer in tape.layers(image=0):
        f = layer.values.double().mean(0)  # over steps
        up = torch.nn.functional.interpolate(f, (height, width), mode="bicubic").clamp(min=0)
        per_head += list(up)
    mean = torch.stack(per_head).mean(0)
    expected = torch.nn.functional.interpolate(mean[None], run.images.shape[1:3], mode="bicubic")[0].clamp(min=0)
    every = DAAM(blocks=("down", "mid", "up")).explain(run)
    np.testing.assert_allclose(every.scores, expected.numpy(), atol=2e-6)


def test_both_occurrences_of_a_word_have_maps_of_their_own(run):
    explanation = DAAM().explain(run)
    assert explanation.units.labels == ("a", "red", "circle", "and", "a#2", "red#2", "square")
    assert not np.allclose(explanation.map_of("red"), explanation.map_of("red#2"))


def test_each_picture_of_a_batch_has_its_own_maps(model, run):
    two = run.again(images=2)
    first, second = (DAAM().explain(two, image=i).scores for i in (0, 1))
    np.testing.assert_allclose(first, DAAM().explain(run).scores, atol=1e-5)
    assert not np.allclose(first, second, atol=1e-4)


def test_a_pipeline_that_is_called_with_embeddings_and_no_prompt_has_its_maps(model, run, monkeypatch):
    kind, given = type(model.pipeline), []
    call = kind.__call__

    def spied(self, *args, **kwargs):
        given.append(kwargs)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(kind, "__call__", spied)
    found = DAAM().explain(run)
    assert given
    assert all(kwargs.get("prompt") is None and kwargs["prompt_embeds"] is not None for kwargs in given)
    assert found.units.labels == ("a", "red", "circle", "and", "a#2", "red#2", "square")
    assert np.ptp(found.map_of("circle")) > 0


def test_blocks_heads_and_layers_choose_what_is_read(run):
    everything = DAAM(blocks=("down", "mid", "up")).explain(run)
    paper = DAAM().explain(run)
    assert any("mid_block" in name for name in everything.details["layers"])
    assert not any("mid_block" in name for name in paper.details["layers"])
    one = everything.details["layers"][0]
    assert DAAM(layers=(one,)).explain(run).details["layers"] == [one]
    two = everything.details["layers"][:2]
    picked = DAAM(heads={two[0]: (0,), two[1]: (1,)}).explain(run)
    assert (picked.details["layers"], picked.details["heads"]) == (two, 2)
    alone = [DAAM(layers=(n,), heads=(h,)).explain(run).scores for n, h in zip(two, (0, 1), strict=True)]
    np.testing.assert_allclose(picked.scores, np.mean(alone, 0), atol=1e-3)
    with pytest.raises(WrongMapError, match="would work"):
        DAAM(layers=("no such layer",)).explain(run)


def test_a_non_square_picture_has_maps_of_its_shape(model):
    run = model.picture("a red circle", seed=1, steps=2, height=32, width=64)
    assert DAAM().explain(run).scores.shape == (3, 32, 64)


def test_a_run_that_does_not_replay_is_refused(run):
    other = dataclasses.replace(run, images=run.images[:, ::-1])
    with pytest.raises(WrongMapError, match="replay"):
        DAAM().explain(other)


def test_a_joint_attention_model_is_refused_with_what_would_work():
    run = load(tiny.flux()).picture("a red circle", seed=1, steps=1)
    with pytest.raises(MethodError, match="concept_attention"):
        whence.explain(run, by="daam")


def test_interaction_of_a_region_with_itself_and_with_its_part():
    whole = np.ones((8, 8), np.float32)
    part = np.zeros((8, 8), np.float32)
    part[:4] = 1
    assert interaction(whole, whole) == {"IoU": 1.0, "IoD": 1.0, "IoH": 1.0}
    assert interaction(whole, part) == {"IoU": 0.5, "IoD": 1.0, "IoH": 0.5}
    assert region(part, 0.4).sum() == 32
