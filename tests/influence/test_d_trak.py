"""D-TRAK: scores foretell retraining; the formula by numpy on a real, tiny text-to-image model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from denoiser import DenoiserObjective, lds, truth
from planted import close, rescored

from whence.engine.influence import bank_of
from whence.engine.randomness import stream
from whence.errors import MethodError, RunError
from whence.influence.d_trak import DTRAK
from whence.models.diffusers_unet import StableDiffusion
from whence.models.objectives import DiffusionObjective
from whence.models.tiny import stable_diffusion
from whence.objective import Listed
from whence.verdict import t_interval


def test_scores_foretell_what_models_trained_on_other_halves_do() -> None:
    found = truth()
    examples = Listed(tuple(found.pictures), tuple(f"digit {i}" for i in range(len(found.pictures))))
    objective = DenoiserObjective(found.model, "squared norm")
    scores = DTRAK().fit(objective, examples).scores(list(found.queries))
    each = lds(scores, found)
    assert each.mean() >= 0.2
    assert t_interval(each.tolist(), 0.05)[0] > 0.1
    rng = stream("d_trak", "shuffled")
    shuffled = [lds(rng.permuted(scores, axis=1), found).mean() for _ in range(20)]
    assert max(shuffled) < 0.2
    assert abs(np.mean(shuffled)) < 0.05


def pictures(n: int = 6) -> list[Any]:
    rng = np.random.default_rng(2)
    captions = ("a red circle", "a blue square", "the green fox")
    return [(captions[i % 3], rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for i in range(n)]


def diffusion(output: str = "squared norm") -> DiffusionObjective:
    return DiffusionObjective(StableDiffusion(stable_diffusion()), timesteps=3, output=output)


LAYERS = ("mid_block.attentions.0.transformer_blocks.0.norm*", "conv_norm_out")


def test_whole_gradients_give_the_papers_formula() -> None:
    objective, examples = diffusion(), pictures()
    fitted = DTRAK(size=None, damping=0.3, layers=LAYERS).fit(objective, Listed(tuple(examples)))
    params = dict(objective.module.named_parameters())
    own = [params[f"{x.name}.{kind}"] for x in fitted.bank.layers for kind in ("weight", "bias")]
    assert len(own) > 1
    scale = fitted.bank.stage_scale
    assert scale is not None

    def phi(example: Any) -> np.ndarray:
        losses = objective.losses([example])
        even = (losses.values / scale[losses.stage]).sum()
        return np.concatenate([g.numpy().ravel() for g in torch.autograd.grad(even, own)]).astype(float)

    rows = np.stack([phi(e) for e in examples])
    gram = rows.T @ rows
    damped = gram + 0.3 * np.trace(gram) / len(rows) * np.eye(len(gram))
    assert close(fitted.scores(examples[:2]), rows[:2] @ np.linalg.solve(damped, rows.T), 5e-3)


def test_the_gradient_is_of_what_is_predicted_not_of_what_should_be() -> None:
    objective, (example, *_) = diffusion(), pictures()
    said, want, _, _ = objective._predicted([example])
    values = objective.losses([example]).values
    assert torch.allclose(values, (said**2).flatten(1).mean(1) / 3)
    assert not torch.allclose(values, ((said - want) ** 2).flatten(1).mean(1) / 3)


def test_a_projection_of_all_weights_keeps_the_order() -> None:
    objective, examples = diffusion(), Listed(tuple(pictures()))
    whole = DTRAK(size=None, layers=LAYERS, damping=1.0).fit(objective, examples).scores(pictures(3))
    projected = DTRAK(size=256, layers=LAYERS, damping=1.0).fit(objective, examples).scores(pictures(3))
    assert np.corrcoef(whole.ravel(), projected.ravel())[0, 1] > 0.9


def test_scores_do_not_depend_on_the_batch_and_what_was_learned_goes_to_another_process() -> None:
    objective, examples = diffusion(), Listed(tuple(pictures()))
    method = DTRAK(size=32, layers=LAYERS)
    fitted = method.fit(objective, examples)
    given = fitted.scores(pictures(2))
    assert close(rescored(fitted, method.scheme(fitted.bank.shapes), 4, pictures(2)), given, 1e-2)
    scheme = method.scheme(fitted.bank.shapes)
    scheme.restore(fitted.scheme.tensors())
    codes = {plane: next(iter(fitted.shelf.blocks(plane)))[1] for plane in fitted.scheme.planes}
    assert np.array_equal(scheme.score(scheme.prepare(fitted.bank.gradients(pictures(2))), codes), given)


def test_an_objective_of_another_output_is_refused_and_told_which_would_do() -> None:
    with pytest.raises(MethodError, match="squared norm"):
        DTRAK().fit(diffusion("loss"), Listed(tuple(pictures())))
    with pytest.raises(RunError, match="features of 0 numbers"):
        DTRAK(size=0).fit(diffusion(), Listed(tuple(pictures())))


def test_a_kernel_that_no_machine_holds_is_refused_before_it_is_made() -> None:
    with pytest.raises(RunError, match=r"1,4\d\d,\d\d\d numbers"):
        DTRAK(size=None).fit(diffusion(), Listed(tuple(pictures())))


def test_the_bank_covers_the_whole_denoiser() -> None:
    assert bank_of(diffusion(), Listed(tuple(pictures())), None, None).coverage > 0.95
