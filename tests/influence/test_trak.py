"""TRAK: carriers above twins; the formula of the paper by numpy; the projection; several models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from planted import auc, by_autograd, close, draws, found, rescored, small, trained, whole
from sentences import tiny, tokenizer
from torch import nn

from whence.engine.gradients import GradientBank
from whence.engine.project import subsampled_hadamard
from whence.errors import RunError
from whence.influence.trak import TRAK, _Scheme
from whence.models.objectives import ClassifierObjective, LanguageObjective, MarginObjective
from whence.models.text import LanguageModel
from whence.objective import Listed


def test_examples_that_taught_the_outcome_stand_above_their_twins() -> None:
    aucs = found(TRAK())
    assert np.mean(aucs) >= 0.98
    assert min(aucs) >= 0.9


def test_several_models_find_them_too_and_with_no_damping_the_kernel_is_noise() -> None:
    several, bare = [], []
    for i, (draw, objective) in enumerate(draws()[:4]):
        models = [objective, *(ClassifierObjective(trained(draw.examples, 100 * s + i)) for s in (1, 2))]
        several.append(auc(TRAK().fit(models, draw.examples).scores([draw.query])[0], draw))
        bare.append(auc(TRAK(damping=0.0).fit(objective, draw.examples).scores([draw.query])[0], draw))
    assert np.mean(several) >= 0.98
    assert np.mean(bare) < 0.9


def features(objective: ClassifierObjective, examples: Any) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of the log-odds of the right class, as the paper writes them, and 1 - p."""
    rows, weights = [], []
    for x, label in examples:
        logp = objective.module(torch.tensor(x)[None]).log_softmax(-1)[0, label]
        rows.append(
            whole({k: g.reshape(1, -1) for k, g in by_autograd(objective.module, logp - (-logp.expm1()).log()).items()})
        )
        weights.append(1 - float(logp.detach().exp()))
    return np.concatenate(rows), np.array(weights)


def formula(models: Any, examples: Any, queries: Any, share: float) -> np.ndarray:
    """tau by numpy, of features that are not projected."""
    kernels, weights = [], []
    for model in models:
        phi, q = features(model, examples)
        asked, _ = features(model, queries)
        gram = phi.T @ phi
        damped = gram + share * np.trace(gram) / min(gram.shape[0], len(phi)) * np.eye(len(gram))
        kernels.append(asked @ np.linalg.inv(damped) @ phi.T)
        weights.append(q)
    return np.mean(kernels, 0) * np.mean(weights, 0)


@pytest.mark.parametrize("share", [0.05, 2.0])
def test_whole_gradients_of_one_model_give_the_papers_formula(share: float) -> None:
    objective, examples, queries = small()
    given = TRAK(size=None, damping=share).fit(objective, examples).scores(queries)
    assert close(given, formula([objective], examples.items, queries, share), 2e-3)


def test_the_means_over_models_are_taken_apart() -> None:
    objective, examples, queries = small()
    models = [objective, *(small(seed=s)[0] for s in (6, 7))]
    given = TRAK(size=None, damping=0.5).fit(models, examples).scores(queries)
    assert close(given, formula(models, examples.items, queries, 0.5), 2e-3)
    together = np.mean([formula([m], examples.items, queries, 0.5) for m in models], 0)
    assert not close(given, together, 0.02)


def test_with_fewer_numbers_than_examples_no_damping_is_needed() -> None:
    objective, examples, queries = small(60)
    given = TRAK(size=8, damping=0.0).fit(objective, examples).scores(queries)
    (phi, q), (asked, _) = features(objective, examples.items), features(objective, queries)
    phi, asked = (subsampled_hadamard(torch.tensor(x), 8, "trak", 0, "0").numpy() for x in (phi, asked))
    assert close(given, asked @ np.linalg.inv(phi.T @ phi) @ phi.T * q, 5e-3)


def test_a_loss_that_is_no_log_odds_has_a_weight_of_one() -> None:
    _, examples, queries = small()

    class Loss(ClassifierObjective):
        """Not taken for its log-odds: it is no plain classifier's objective."""

    objective = Loss(small()[0].module)
    given = TRAK(size=None, damping=0.5).fit(objective, examples).scores(queries)
    rows = [
        whole(
            {k: g.reshape(1, -1) for k, g in by_autograd(objective.module, objective.losses([e]).values.sum()).items()}
        )
        for e in (*examples.items, *queries)
    ]
    phi, asked = np.concatenate(rows[:-2]), np.concatenate(rows[-2:])
    gram = phi.T @ phi
    damped = gram + 0.5 * np.trace(gram) / len(phi) * np.eye(len(gram))
    assert close(given, asked @ np.linalg.inv(damped) @ phi.T, 2e-3)


def test_the_log_odds_can_be_handed_in_as_they_are() -> None:
    objective, examples, queries = small()
    margins = MarginObjective(objective.module)
    assert np.array_equal(
        TRAK().fit(objective, examples).scores(queries), TRAK().fit(margins, examples).scores(queries)
    )


def test_the_projection_keeps_inner_products_as_well_as_a_dense_matrix_of_signs() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1000, generator=g)
    a[:10] += 20  # a few large numbers: what is not spread out is hardest to keep
    b[:10] += 20
    true, size = float(a @ b), float(a.norm() * b.norm())
    kept, dense = [], []
    for seed in range(200):
        p, q = subsampled_hadamard(torch.stack([a, b]), 64, "trak", seed, "0")
        kept.append(float(p @ q))
        signs = torch.randint(0, 2, (1000, 64), generator=g) * 2.0 - 1
        dense.append(float((a @ signs) @ (b @ signs)) / 64)
    assert abs(np.mean(kept) - true) < 4 * np.std(kept) / 200**0.5
    assert np.std(kept) < 1.15 * np.std(dense)
    assert np.std(kept) < 0.25 * size


def test_the_projection_is_linear_and_the_same_for_each_row() -> None:
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p = subsampled_hadamard(x, 32, "trak", 3, "0")
    assert p.shape == (5, 32)
    torch.testing.assert_close(subsampled_hadamard(x[2:3], 32, "trak", 3, "0"), p[2:3])
    torch.testing.assert_close(subsampled_hadamard(2 * x[:1] - x[1:2], 32, "trak", 3, "0"), 2 * p[:1] - p[1:2])
    assert not torch.allclose(subsampled_hadamard(x, 32, "trak", 4, "0"), p)
    assert torch.equal(subsampled_hadamard(x, None, "trak", 3), x)
    assert torch.equal(subsampled_hadamard(x, 300, "trak", 3), x)


def test_nearly_all_numbers_of_the_transform_keep_nearly_all_of_the_length() -> None:
    x = torch.randn(3, 1024, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept = subsampled_hadamard(x, 1023, "trak", 0)
    assert torch.allclose(kept.square().sum(1), x.square().sum(1), rtol=0.02)
    assert torch.allclose(kept @ kept.T, x @ x.T, atol=20)


def test_scores_depend_neither_on_the_batch_nor_on_what_was_asked_before() -> None:
    objective, examples, queries = small()
    method = TRAK(size=16)
    fitted = method.fit(objective, examples)
    given = fitted.scores(queries)
    again = rescored(fitted, _Scheme(fitted.bank.shapes, method), 5, queries)
    assert close(again, given, 2e-3)
    assert close(fitted.scores(queries[::-1])[::-1], given, 1e-6)
    assert not close(TRAK(size=16, seed=1).fit(objective, examples).scores(queries), given, 0.05)


def test_what_was_learned_goes_to_another_process() -> None:
    objective, examples, queries = small()
    method = TRAK(size=16)
    fitted = method.fit([objective, small(seed=6)[0]], examples)
    scheme = _Scheme(fitted.bank.shapes, method)
    scheme.restore(fitted.scheme.tensors())
    codes = {plane: next(iter(fitted.shelf.blocks(plane)))[1] for plane in fitted.scheme.planes}
    grads = fitted.bank.gradients(queries)
    assert np.array_equal(scheme.score(scheme.prepare(grads), codes), fitted.scores(queries))
    assert {plane: rows.shape[1] for plane, rows in codes.items()} == scheme.planes


def test_small_scores_are_cut_off_and_the_others_come_nearer_to_nothing() -> None:
    objective, examples, queries = small()
    plain = TRAK().fit(objective, examples).scores(queries)
    cut = float(np.median(np.abs(plain)))
    soft = TRAK(threshold=cut).fit(objective, examples).scores(queries)
    assert np.allclose(soft, np.sign(plain) * np.maximum(np.abs(plain) - cut, 0))
    assert 0.4 < (soft == 0).mean() < 0.6


def test_weights_flags_and_the_global_generator_are_as_they_were() -> None:
    objective, examples, queries = small()
    before, state = {k: v.clone() for k, v in objective.module.state_dict().items()}, torch.get_rng_state()
    TRAK().fit(objective, examples).explain(queries[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in objective.module.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in objective.module.parameters())


def test_layers_can_be_named_and_are_those_of_every_model() -> None:
    objective, examples, queries = small()
    fitted = TRAK(layers=("2",)).fit([objective, small(seed=6)[0]], examples)
    assert {x.name for x in fitted.bank.layers} == {"models.0.2", "models.1.2", "weights.0", "weights.1"}
    assert fitted.scores(queries).shape == (2, 24)


def test_a_language_model_is_asked_for_its_loss_and_may_be_projected_by_layer_first() -> None:
    texts = [f"Anna has {n} keys." for n in ("two", "three", "no", "all", "many")]
    objective = LanguageObjective(LanguageModel(tiny("gpt2"), tokenizer()))
    given = TRAK(size=64, side=4).fit(objective, Listed(tuple(texts))).explain(texts[2])
    assert given.units.kind == "training example"
    assert int(np.argmax(given.scores)) == 2
    assert GradientBank(objective).coverage > 0.9


@pytest.mark.parametrize(
    ("models", "settings", "said"),
    [
        ([], {}, "TRAK of 0 models"),
        ("twice", {}, "share one network"),
        ("one", {"size": 0}, "features of 0 numbers"),
    ],
)
def test_bad_settings_are_one_clear_error(models: Any, settings: dict[str, Any], said: str) -> None:
    objective, examples, _ = small()
    chosen = {"twice": [objective, ClassifierObjective(objective.module)], "one": [objective]}
    with pytest.raises(RunError, match=said):
        TRAK(**settings).fit(chosen[models] if isinstance(models, str) else models, examples)


def test_a_bare_layer_is_a_model_too() -> None:
    rng = np.random.default_rng(0)
    examples = Listed(tuple((rng.normal(size=4).astype(np.float32), int(rng.integers(2))) for _ in range(12)))
    objective = ClassifierObjective(nn.Linear(4, 2))
    assert TRAK().fit(objective, examples).scores([examples[0]]).shape == (1, 12)
