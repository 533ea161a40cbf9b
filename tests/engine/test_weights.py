"""The weight desk: the solver against the textbook's formula, and what may not be edited."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from whence.engine.weights import least_squares, matrix, recorded, refuse_conflict, shared_solve
from whence.errors import MethodError, ModelError


def block(bias: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"to_k": nn.Linear(12, 5, bias=bias), "to_v": nn.Linear(12, 7, bias=bias)})


@pytest.mark.parametrize(("edited", "kept"), [(3, 0), (3, 4), (9, 30)])
def test_the_shared_solve_is_the_papers_formula_for_each_matrix_alone(edited: int, kept: int) -> None:
    module = block()
    both = [matrix("unet", module, n) for n in ("to_k", "to_v")]
    k, rest = torch.randn(edited, 12), torch.randn(kept, 12)
    v = [torch.randn(edited, m.weight.shape[0]) for m in both]
    new, foreseen = least_squares(both, k, v, 0.1, rest if kept else None, 2.0, 0.5)
    for m, w, values, told in zip(both, new, v, foreseen, strict=True):
        w0, kd, rd = m.weight.detach().double(), k.double(), rest.double()
        left = 0.1 * w0 + 2.0 * values.double().T @ kd + 0.5 * w0 @ rd.T @ rd
        right = 0.1 * torch.eye(12).double() + 2.0 * kd.T @ kd + 0.5 * rd.T @ rd
        wanted = left @ torch.linalg.inv(right)
        assert torch.allclose(w.double(), wanted, atol=1e-5)
        gap = values.double() - kd @ w0.T
        assert told.edit == pytest.approx(float((values.double() - kd @ wanted.T).norm() / gap.norm()), abs=1e-4)
        assert told.name == m.name


def test_both_ways_of_solving_agree() -> None:
    k, rest = torch.randn(4, 12).double(), torch.randn(6, 12).double()
    few = shared_solve(k, rest, 0.3)
    full = k @ torch.linalg.inv(0.3 * torch.eye(12).double() + k.T @ k + rest.T @ rest)
    assert torch.allclose(few, full, atol=1e-10)
    assert torch.allclose(shared_solve(k, torch.cat([rest] * 3), 0.3)[:, 0].isfinite().double(), torch.ones(4).double())


def test_a_key_that_is_both_edited_and_kept_is_a_conflict_in_numbers() -> None:
    m = matrix("unet", block(), "to_k")
    k = torch.randn(3, 12)
    wanted = [torch.randn(3, 5)]
    _, free = least_squares([m], k, wanted, 1e-3)
    refuse_conflict(free, 0.3, "the change red -> blue")
    _, torn = least_squares([m], k, wanted, 1e-3, k)
    assert torn[0].edit == pytest.approx(0.5, abs=0.02)
    with pytest.raises(MethodError, match=r"0\.50 of the way to go, 0\.30 is wanted"):
        refuse_conflict(torn, 0.3, "the change red -> blue")


def test_what_an_adapter_and_a_bias_add_is_not_the_matrix_own() -> None:
    peft = pytest.importorskip("peft", reason="NOT TRIED with adapters: pip install peft")
    config = peft.LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False)
    wrapped = peft.get_peft_model(block(bias=True), config).base_model.model
    m = matrix("unet", wrapped, "to_k")
    assert m.name == "unet.to_k.weight"
    assert m.weight is wrapped.to_k.base_layer.weight
    k = torch.randn(3, 12)
    assert torch.allclose(m.added(k) + k @ m.weight.T, wrapped.to_k(k), atol=1e-6)
    wrapped.to_k.merge()
    with pytest.raises(ModelError, match="merged"):
        matrix("unet", wrapped, "to_k")


def test_quantised_compiled_and_missing_layers_are_refused() -> None:
    module = block()
    with pytest.raises(ModelError, match="no such layer"):
        matrix("unet", module, "to_q")
    module["to_k"].weight = nn.Parameter(torch.ones(5, 12, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="quantised"):
        matrix("unet", module, "to_k")
    compiled = block()
    compiled["to_v"]._compiled_call_impl = compiled["to_v"].forward  # as nn.Module.compile leaves it
    with pytest.raises(ModelError, match="compiled"):
        matrix("unet", compiled, "to_v")


def test_hooks_come_off_after_a_crash() -> None:
    module = block()
    m = matrix("unet", module, "to_k")

    def crash() -> None:
        with recorded([m]) as seen:
            module["to_k"](torch.ones(2, 12))
            assert seen[m.name][1].shape == (2, 5)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        crash()
    assert not module["to_k"]._forward_hooks
