"""Gradients of the bank against autograd, one example at a time, for every kind of layer; then invariances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from sentences import tiny, tokenizer
from torch import nn

from whence.engine.gradients import GradientBank
from whence.engine.project import Projection
from whence.errors import MethodError, RunError
from whence.models.diffusers_unet import StableDiffusion
from whence.models.graphs import undirected  # it quietens what PyG says when it is imported
from whence.models.objectives import (
    ClassifierObjective,
    DiffusionObjective,
    GraphObjective,
    LanguageObjective,
    Piece,
)
from whence.models.text import LanguageModel
from whence.models.tiny import stable_diffusion
from whence.objective import Losses


def seeded(build: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return build()


def images(n: int = 5) -> list[tuple[np.ndarray, int]]:
    rng = np.random.default_rng(0)
    return [(rng.normal(size=(3, 8, 8)).astype(np.float32), i % 4) for i in range(n)]


class Separable(nn.Module):
    """Convolutions of every sort, norms, an activation that overwrites its input."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, padding="same", groups=8, dilation=2),
            nn.GroupNorm(2, 8),
            nn.Conv2d(8, 6, (2, 1), bias=False),
            nn.ReLU(inplace=True),
            nn.Flatten(),
        )
        self.norm, self.head = nn.LayerNorm(72), nn.Linear(72, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(x)))  # type: ignore[no-any-return]


class Voxels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.deep, self.line, self.head = nn.Conv3d(3, 4, 2), nn.Conv1d(4, 5, 3, stride=2, padding=1), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        deep = self.deep(torch.stack([x, x.flip(-1)], 2)).flatten(2)
        return self.head(self.line(deep).mean(-1))  # type: ignore[no-any-return]


def causal(kind: str) -> LanguageModel:
    return LanguageModel(tiny(kind), tokenizer())


TEXTS = ["Anna is in the kitchen.", ("Where is Anna?", " Answer: here."), "Ben has the key, and Clara took the lamp."]


def graphs() -> list[Any]:
    rng = np.random.default_rng(1)
    return [
        (undirected(rng.normal(size=(n, 5)).astype(np.float32), rng.integers(0, n, (2 * n, 2))), n % 2)
        for n in (3, 6, 4)
        for n in (3, 6, 4)
    ]


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()

        from torch_geometric.nn import GATConv, GCNConv

        self.first, self.second, self.head = GCNConv(5, 8), GATConv(8, 6, heads=2), nn.Linear(12, 2)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        from torch_geometric.nn import global_mean_pool

        x = self.second(self.first(x, edge_index).relu(), edge_index).relu()
        return self.head(global_mean_pool(x, batch))  # type: ignore[no-any-return]


def pictures() -> list[Any]:
    rng = np.random.default_rng(2)
    return [(c, rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for c in ("a red circle", "a blue square")]


def diffusion(**settings: Any) -> DiffusionObjective:
    return DiffusionObjective(StableDiffusion(stable_diffusion()), timesteps=3, **settings)


CASES: dict[str, Any] = {
    "convolutions": lambda: (ClassifierObjective(seeded(Separable)), images()),
    "voxels": lambda: (ClassifierObjective(seeded(Voxels)), images()),
    "gpt2": lambda: (LanguageObjective(causal("gpt2")), TEXTS),
    "llama": lambda: (LanguageObjective(causal("llama")), TEXTS),
    "gemma3": lambda: (LanguageObjective(causal("gemma3")), TEXTS),
    "mamba": lambda: (LanguageObjective(causal("mamba")), TEXTS),
    "diffusion": lambda: (diffusion(), pictures()),
    "squared norm": lambda: (diffusion(output="squared norm"), pictures()),
    "graphs": lambda: (GraphObjective(seeded(Convolved)), graphs()),
}


def by_autograd(objective: Any, bank: GradientBank, example: Any) -> dict[str, torch.Tensor]:
    """A layer's gradient of one example's loss as torch itself takes it, laid out as the bank does."""
    objective.module.zero_grad(set_to_none=True)
    objective.losses([example]).values.sum().backward()
    found = {}
    modules = dict(objective.module.named_modules())
    for layer in bank.layers:
        module = modules[layer.name]
        zero = torch.zeros_like(module.weight)
        weight = zero if module.weight.grad is None else module.weight.grad.clone()
        matrix = weight.T if layer.kind == "transposed" else weight.reshape(len(weight), -1)
        if layer.bias:
            bias = torch.zeros_like(module.bias) if module.bias.grad is None else module.bias.grad
            matrix = torch.cat([matrix, bias[:, None]], 1)
        found[layer.name] = matrix
    objective.module.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("case", CASES)
def test_each_examples_gradient_is_the_one_that_autograd_takes_of_it_alone(case: str) -> None:
    objective, examples = CASES[case]()
    bank = GradientBank(objective)
    bank.check(examples[0], drop=case == "mamba")
    given = bank.gradients(examples)
    for i, example in enumerate(examples):
        alone = by_autograd(objective, bank, example)
        largest = max(float(g.abs().max()) for g in alone.values())
        assert largest > 1e-6
        for name, matrix in alone.items():
            assert given[name].shape[1:] == matrix.shape
            assert float((given[name][i] - matrix).abs().max()) <= 2e-5 * largest, (case, name)


@pytest.mark.parametrize("case", ["convolutions", "gpt2", "llama", "diffusion", "graphs"])
def test_a_projected_gradient_is_the_projection_of_the_gradient(case: str) -> None:
    objective, examples = CASES[case]()
    projection = Projection(size=5, seed=1)
    whole, small = GradientBank(objective), GradientBank(objective, projection=projection)
    full, given = whole.gradients(examples), small.gradients(examples)
    largest = max(float(g.abs().max()) for g in full.values())
    for layer in whole.layers:
        out, inp = small.shapes[layer.name]
        g = full[layer.name]
        p_out = projection.side(layer.name, "out", layer.out, out)
        p_in = projection.side(layer.name, "in", layer.inp, inp)
        g = g if p_out is None else p_out.T @ g
        g = g if p_in is None else g @ p_in
        assert g.shape[1:] == (out, inp)
        assert float((given[layer.name] - g).abs().max()) <= 1e-4 * largest


def test_a_projection_keeps_inner_products_in_the_mean() -> None:
    objective, examples = CASES["gpt2"]()
    full = GradientBank(objective, layers=["*c_attn"]).gradients(examples)
    name = next(iter(full))
    true = float((full[name][0] * full[name][1]).sum())
    scale = float(full[name][0].norm() * full[name][1].norm())
    found = []
    for seed in range(60):
        g = GradientBank(objective, [name], Projection(size=8, seed=seed)).gradients(examples)[name]
        found.append(float((g[0] * g[1]).sum()))
    error = np.std(found) / len(found) ** 0.5
    assert abs(np.mean(found) - true) < 3 * error
    assert np.std(found) < scale  # and another seed gives another projection
    assert np.std(found) > 0


def test_what_went_in_and_what_came_back_multiply_to_the_gradient() -> None:
    objective, examples = CASES["convolutions"]()
    bank = GradientBank(objective)
    given = bank.gradients(examples)
    seen = set()
    for layer, a, g in bank.factors(examples):
        torch.testing.assert_close(g.transpose(1, 2) @ a, given[layer.name])
        seen.add(layer.name)
    assert seen == set(bank.factored)
    assert "body.3" not in seen  # in groups
    assert "norm" not in seen


def test_gradients_do_not_depend_on_the_batch_or_its_order() -> None:
    objective, examples = CASES["llama"]()
    bank = GradientBank(objective, projection=Projection(size=6))
    together, turned = bank.gradients(examples), bank.gradients(examples[::-1])
    for i, example in enumerate(examples):
        alone = bank.gradients([example])
        for name in together:
            scale = float(together[name].abs().max()) + 1e-12
            assert float((alone[name][0] - together[name][i]).abs().max()) < 1e-4 * scale
            assert float((turned[name][-1 - i] - together[name][i]).abs().max()) < 1e-4 * scale


def test_a_timesteps_gradients_are_brought_to_one_size_before_they_are_added() -> None:
    objective, examples = diffusion(), pictures()
    bank = GradientBank(objective)
    plain = bank.gradients(examples)
    bank.stage_scale = torch.tensor([2.0, 2.0, 2.0])
    halved = bank.gradients(examples)
    for name, g in plain.items():
        torch.testing.assert_close(halved[name], g / 2)
    bank.learn_stages(examples, 2)
    sizes = []
    for stage in range(3):
        alone = torch.where(torch.arange(3) == stage, bank.stage_scale, torch.inf)
        bank_of = GradientBank(objective)
        bank_of.stage_scale = alone
        g = bank_of.gradients(examples)
        sizes.append(float(torch.stack([x.flatten(1).pow(2).sum(1) for x in g.values()]).sum(0).sqrt().mean()))
    assert sizes == pytest.approx([1.0, 1.0, 1.0], rel=1e-4)


def test_weights_are_as_they_were_and_no_hook_is_left_when_a_loss_fails() -> None:
    objective, examples = CASES["gpt2"]()
    bank = GradientBank(objective)
    flags = [p.requires_grad for p in objective.module.parameters()]

    def broken(_: Sequence[Any]) -> Losses:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        bank.gradients(examples, losses=broken)
    assert [p.requires_grad for p in objective.module.parameters()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in objective.module.modules())
    bank.gradients(examples)
    assert all(p.grad is None for p in objective.module.parameters())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks transformers by an old name
def test_only_what_was_trained_is_tracked_adapters_alone_where_the_rest_is_frozen() -> None:
    from peft import LoraConfig, get_peft_model

    model = causal("llama")
    wrapped = get_peft_model(model.model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    objective = LanguageObjective(LanguageModel(wrapped, model.tokenizer))
    bank = GradientBank(objective)
    assert {x.name.split(".")[-2] for x in bank.layers} == {"lora_A", "lora_B"}
    given = bank.gradients(TEXTS[:1])
    alone = by_autograd(objective, bank, TEXTS[0])
    for name, matrix in alone.items():
        torch.testing.assert_close(given[name][0], matrix, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("prompt", ["", "Ben has the key. "])
def test_gradients_of_the_tokens_of_a_text_add_up_to_that_of_the_text(prompt: str) -> None:
    objective = LanguageObjective(causal("llama"))
    text = "Anna is in the kitchen."
    _, spans = objective.adapter.encode_output(text)
    # Where nothing comes before the first token, no token that begins texts either, it has no loss.
    skipped = int(not prompt and len(objective.adapter.encode(text)[0]) == len(spans))
    pieces = [Piece(prompt, text, a, b) for a, b in spans[skipped:]]
    whole = (prompt, text) if prompt else text
    bank = GradientBank(objective)
    each, added = bank.gradients(pieces), bank.gradients([whole])
    for name, matrix in added.items():
        torch.testing.assert_close(each[name].sum(0), matrix[0], rtol=1e-3, atol=1e-5)
    a, b = spans[2]
    few = objective.losses([Piece(prompt, text, a, spans[3][1]), Piece(prompt, text, a, b), pieces[3 - skipped]])
    torch.testing.assert_close(few.values[0], few.values[1] + few.values[2])
    with pytest.raises(RunError, match="no token"):
        objective.losses([Piece(prompt, text, 900, 901)])


class Odd(nn.Module):
    """A weight of its own that no layer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.head = nn.Parameter(torch.ones(192)), nn.Linear(192, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1) * self.gain)  # type: ignore[no-any-return]


def test_what_is_not_covered_is_said_with_its_share() -> None:
    bank = GradientBank(ClassifierObjective(seeded(Odd)))
    assert bank.uncovered == (" (Odd)",)
    assert bank.coverage == pytest.approx(772 / 964)


def test_a_layer_whose_weight_is_used_behind_its_back_is_left_out_and_named() -> None:
    objective, examples = CASES["mamba"]()
    bank = GradientBank(objective)
    before = bank.coverage
    with pytest.raises(MethodError, match="conv1d"):
        bank.gradients(examples)
    bank.check(examples[0], drop=True)
    assert any("conv1d" in name for name in bank.uncovered)
    assert 0.5 < bank.coverage < before


def test_no_layer_left_is_one_clear_error() -> None:
    with pytest.raises(MethodError, match="layers like nothing"):
        GradientBank(ClassifierObjective(seeded(Odd)), layers=["nothing*"])


class Stacked(nn.Module):
    """Puts two places of each input onto the batch axis: a row there is no example."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(96, 5), nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(x.reshape(-1, 96)).view(len(x), 10))  # type: ignore[no-any-return]


def test_activations_that_cannot_be_told_apart_by_example_are_refused_by_name() -> None:
    with pytest.raises(MethodError, match="inner by example"):
        GradientBank(ClassifierObjective(seeded(Stacked))).gradients(images())
    kept = GradientBank(ClassifierObjective(seeded(Stacked)), layers=["head"]).gradients(images())
    assert set(kept) == {"head"}


class Doubled(nn.Linear):
    """A layer that is no longer what its class says."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_layer_that_computes_in_another_way_than_its_class_is_refused() -> None:
    model = seeded(lambda: nn.Sequential(nn.Flatten(), Doubled(192, 4)))
    with pytest.raises(MethodError, match="differ from autograd"):
        GradientBank(ClassifierObjective(model)).gradients(images())
