"""The weight desk: which matrices of a model can be edited, and the one regularised least squares that edits them.

Every closed-form edit asks for the matrix W* that sends keys k to new values v and leaves the rest as it is:

    W* = argmin  edit sum |W k - v|^2 + keep sum |W k' - W0 k'|^2 + lam |W - W0|^2
       = (lam W0 + edit sum v k^T + keep sum W0 k' k'^T)(lam I + edit sum k k^T + keep sum k' k'^T)^-1
       = W0 + edit (V - W0 K) K^T A^-1

The last form is what is computed: A depends on the keys alone, so matrices that read the same keys share one
factorisation, and A^-1 is needed for the edited keys only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MethodError, ModelError

# --- matrices --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Matrix:
    """A linear layer's weight, [out, in]. ``name``: component and place in it, as in the pipeline's files. ``layer``:
    what the model calls; ``base``: the layer that holds the weight, another one where an adapter (LoRA) wraps it."""

    name: str
    layer: nn.Module
    base: nn.Module

    @property
    def weight(self) -> Tensor:
        """[out, in]."""
        return self.base.weight  # type: ignore[return-value]

    def added(self, keys: Tensor) -> Tensor:
        """What the layer adds to W k, [key, out]: its bias, and what an adapter adds."""
        with torch.no_grad():
            out: Tensor = self.layer(keys.to(self.weight.dtype))
            return out - keys.to(self.weight.dtype) @ self.weight.T


def matrix(component: str, module: nn.Module, place: str) -> Matrix:
    """The matrix at ``place``, a module's name in a component. Raises ModelError where there is none or it cannot be
    edited: a quantised or compiled one, or one with an adapter merged in."""
    asked = f"an edit of {component}.{place}"
    try:
        layer = module.get_submodule(place)
    except AttributeError:
        raise ModelError(asked, "the model has no such layer", _linear_names(module)) from None
    base = getattr(layer, "base_layer", layer)
    if any(_compiled(part) for part in (module, layer, base)):
        raise ModelError(asked, "it is compiled: its code may hold the old weights", "the model before torch.compile")
    if getattr(layer, "merged", False) is True:
        raise ModelError(asked, "an adapter is merged into it", "unmerge_adapter() first, or merge_and_unload()")
    weight: Any = getattr(base, "weight", None)
    plain = isinstance(weight, Tensor) and type(weight.data) is Tensor and weight.is_floating_point()
    if not plain or hasattr(weight, "quant_state") or weight.ndim != 2 or weight.dtype.itemsize < 2:
        kind = f"{type(base).__name__} of {getattr(weight, 'dtype', 'no weight')}"
        raise ModelError(asked, f"no plain matrix but {kind}: quantised, or no linear layer", "float32 or half weights")
    if weight.is_meta:
        raise ModelError(asked, "its weight is not in memory (offloaded)", "the model without offloading")
    return Matrix(f"{component}.{place}.weight", layer, base)


def _compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _linear_names(module: nn.Module) -> str:
    names = [n for n, m in module.named_modules() if isinstance(m, nn.Linear) and ".lora_" not in n]
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


@contextmanager
def recorded(matrices: Iterable[Matrix]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """While inside, what goes into each matrix and what its layer gives: name -> ([..., in], [..., out]) of the last
    call."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Any:
        def see(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            seen[name] = args[0].detach(), out.detach()

        return see

    with ExitStack() as stack:
        for m in matrices:
            stack.callback(m.layer.register_forward_hook(hook(m.name)).remove)
        yield seen


# --- least squares ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Foreseen:
    """What an edit of one matrix will do, known before anything changes. ``edit``: distance of the new values from the
    wanted ones, as a share of what it is now (0: all there, 1: nothing done). ``keep``: how far the kept values move,
    as a share of their size; 0 where nothing is to be kept. ``size``: norm of the change as a share of the matrix's."""

    name: str
    edit: float
    keep: float
    size: float


def least_squares(
    matrices: Sequence[Matrix],
    keys: Tensor,
    values: Sequence[Tensor],
    lam: float,
    keep: Tensor | None = None,
    edit_weight: float = 1.0,
    keep_weight: float = 1.0,
) -> tuple[list[Tensor], list[Foreseen]]:
    """New weights of matrices that read the same keys, and what is foreseen of each.

    ``keys`` [pair, in]; ``values`` of each matrix [pair, out]: what W k shall be; ``keep`` [kept, in]: keys whose
    values shall stay. Raises MethodError for a ``lam`` that is no positive number and where the keys are not finite.
    """
    if not lam > 0:
        raise MethodError(f"an edit with lam {lam:g}", "the problem has no single answer", "a lam above 0")
    k = keys.double()
    kept = k[:0] if keep is None else keep.double()
    x = shared_solve(k, kept, lam, edit_weight, keep_weight)
    if not bool(torch.isfinite(x).all()):
        raise MethodError("an edit", "keys or weights that are not finite", "a model whose activations are finite")
    # What W* makes of a key differs from what W0 makes of it by edit (K' x^T)(V - W0 K): foreseen without W*.
    size = _folded(kept)
    edited, moved = edit_weight * k @ x.T, edit_weight * size @ x.T.float()
    new, foreseen = [], []
    for m, v in zip(matrices, values, strict=True):
        w = m.weight.detach().double()
        gap = v.double() - k @ w.T
        delta = edit_weight * gap.T @ x
        new.append((w + delta).to(m.weight.dtype))
        keep_error = _share(moved @ gap.float(), size @ w.float().T) if len(kept) else 0.0
        foreseen.append(Foreseen(m.name, _share(gap - edited @ gap, gap), keep_error, _share(delta, w)))
    return new, foreseen


def shared_solve(k: Tensor, kept: Tensor, lam: float, edit_weight: float = 1.0, keep_weight: float = 1.0) -> Tensor:
    """K^T A^-1 [pair, in] for A = lam I + edit K^T K + keep K'^T K': through the smaller of two systems, of the size of
    a key or of the number of keys."""
    scaled = torch.cat([math.sqrt(edit_weight) * k, math.sqrt(keep_weight) * kept])
    n, size = scaled.shape
    if n < size:
        # S^T-rows pass through: S A^-1 = (lam I + S S^T)^-1 S, of which the first rows are the edited keys.
        system = scaled @ scaled.T
        system.diagonal().add_(lam)
        rows: Tensor = torch.cholesky_solve(scaled, torch.linalg.cholesky(system))
        return rows[: len(k)] / math.sqrt(edit_weight)
    system = scaled.T @ scaled
    system.diagonal().add_(lam)
    solved: Tensor = torch.cholesky_solve(k.T, torch.linalg.cholesky(system))
    out: Tensor = solved.T
    return out


def _folded(keys: Tensor) -> Tensor:
    """As many rows as a key has numbers, at most, of which any matrix makes values of the same norm: enough to tell how
    large those of all keys are."""
    if len(keys) <= keys.shape[1]:
        return keys.float()
    upper: Tensor = torch.linalg.qr(keys, mode="r").R
    return upper.float()


def _share(part: Tensor, whole: Tensor) -> float:
    size = float(whole.norm())
    return float(part.norm()) / size if size else 0.0


def refuse_conflict(foreseen: Sequence[Foreseen], wanted: float, what: str) -> None:
    """Raises MethodError where the keys to keep stand against the edit: the mean edit error foreseen is above
    ``wanted``."""
    found = sum(f.edit for f in foreseen) / len(foreseen)
    if found > wanted:
        worst = max(foreseen, key=lambda f: f.edit)
        raise MethodError(
            what,
            f"it conflicts with what is to be kept: the edit would leave {found:.2f} of the way to go, {wanted:.2f} is "
            f"wanted (worst: {worst.name}, {worst.edit:.2f}; kept values would move by {worst.keep:.2f})",
            "keep less, weigh the kept less (keep_weight), or ask for less (wanted)",
        )


def cross_attention(model: Any) -> list[Matrix]:
    """The key and value projections of all attentions over text, which read the text encoder's states as they are.
    Raises ModelError for a model that projects or mixes these first."""
    pipeline = model.pipeline
    denoiser = getattr(pipeline, "unet", None)
    if "cross-attention" not in model.capabilities or denoiser is None:
        raise ModelError(
            f"an edit of the attention over text of {model.name}", f"a {model.family} does not read the text as it is",
            "Stable Diffusion 1 or 2, SDXL; or an edit of the text encoder (diff_quickfix)",
        )  # fmt: skip
    places = [f"{layer.name}.{to}" for layer in model.layers(*model.default_size) for to in ("to_k", "to_v")]
    return [matrix("unet", denoiser, place) for place in places]
