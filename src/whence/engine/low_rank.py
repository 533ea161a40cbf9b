"""Low-rank factors beside a model's matrices (LoRA, Hu et al. 2022): W x + B A x, with W held still.

The factors act through hooks on the layers, which always come off; no weight is touched while they are trained. What
they have become is handed over as matrices before and after, W and W + B A, for a `Change`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .descent import cosine, descend
from .learned_token import Example, Teaching, noised
from .progress import Advance
from .randomness import seed_of, torch_stream
from .weights import Matrix, matrix

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
Loss = Callable[[list[Example], Tensor, Tensor, Tensor], Tensor]
"""``loss(examples, x_t, t, want)``: of one step, from what `noised` gives."""


def attention_matrices(model: Any) -> list[Matrix]:
    """All projections of the denoiser's attention, over places and over text. Raises ModelError where one cannot be
    edited."""
    unet = model.denoiser
    places = [n for n, m in unet.named_modules() if isinstance(m, nn.Linear) and n.endswith(PROJECTIONS)]
    return [matrix("unet", unet, n) for n in places]


class Factors:
    """A [rank, in], drawn, and B [out, rank], zero, of each matrix: nothing changes until B is trained."""

    def __init__(self, matrices: Sequence[Matrix], rank: int, seed: int = 0) -> None:
        self.matrices, self.rank = tuple(matrices), rank
        self.taught: dict[str, nn.Parameter] = {}
        for m in matrices:
            out, wide = m.weight.shape
            drawn = torch.randn(rank, wide, generator=torch_stream("low rank", seed, m.name)) / math.sqrt(wide)
            self.taught[f"{m.name}.A"] = nn.Parameter(drawn.to(m.weight))
            self.taught[f"{m.name}.B"] = nn.Parameter(m.weight.new_zeros(out, rank))

    @contextmanager
    def on(self) -> Iterator[None]:
        """The layers add B A x while inside."""

        def hook(a: Tensor, b: Tensor) -> Callable[..., Tensor]:
            return lambda _, args, out: out + (args[0] @ a.T) @ b.T

        with ExitStack() as stack:
            for m in self.matrices:
                a, b = self.taught[f"{m.name}.A"], self.taught[f"{m.name}.B"]
                stack.callback(m.layer.register_forward_hook(hook(a, b)).remove)
            yield

    def matrices_after(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """W and W + B A of each matrix, by name."""
        before = {m.name: m.weight.detach().clone() for m in self.matrices}
        made = {n: (self.taught[f"{n}.B"] @ self.taught[f"{n}.A"]).detach() for n in before}
        return before, {n: w + made[n] for n, w in before.items()}


def tune(
    model: Any,
    objective: Any,
    factors: Factors,
    loss: Loss,
    examples: Sequence[Example],
    teaching: Teaching,
    *,
    beside: Mapping[str, nn.Parameter] | None = None,
    settings: Mapping[str, Any] | None = None,
    path: Path | None = None,
    advance: Advance | None = None,
) -> tuple[float, ...]:
    """Train factors, and what stands ``beside`` them, by Adam; the losses. Nothing of the model moves.

    ``path``: a safetensors file that a stopped training goes on from. Deterministic by ``teaching.seed``. Raises
    RunError where ``path`` is of another training.
    """
    taught = {**factors.taught, **(beside or {})}
    sums = [float(e.latents.double().sum()) for e in examples]
    begins = [float(p.detach().double().sum()) for p in taught.values()]
    captions = [e.caption for e in examples]
    about = seed_of("low rank", teaching, dict(settings or {}), model.fingerprint, captions, sums, begins)
    frozen = [(p, p.requires_grad) for p in objective.module.parameters()]
    try:
        for p, _ in frozen:
            p.requires_grad_(False)

        def step_loss(step: int) -> Tensor:
            return loss(*noised(objective, examples, teaching, step))

        rate = cosine(teaching.rate, teaching.steps)
        with factors.on():
            losses = descend(taught, step_loss, teaching.steps, rate, about, path=path, advance=advance)
    finally:
        for p, before in frozen:
            p.requires_grad_(before)
    return tuple(losses)
