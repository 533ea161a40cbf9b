"""Two things asked, one drawn: can the attention be pulled apart while sampling?

A-STAR (Agarwal et al. 2023) changes the latents z_t before each denoising step, by one step down the gradient of two
losses of the cross-attention maps A_t^m of the concepts m in C:

    L_seg = sum over m > n of  sum_ij min(A_t^m, A_t^n) / sum_ij (A_t^m + A_t^n)         segregation    (eq. 2)
    L_ret = sum over m of  1 - sum_ij min(A_t^m, B_t-1^m) / sum_ij (A_t^m + B_t-1^m)     retention      (eq. 3)
    z'_t = z_t - alpha * gradient of (L_seg + L_ret) with respect to z_t                                (eq. 4)

Segregation lets no two concepts claim a place; retention keeps each where it was: B_t-1^m is 1 where the map of the
step before reached half of its highest value, else 0. Nothing is trained, and weights are not touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import MethodError
from ..method import Card

if TYPE_CHECKING:
    from torch import Tensor

    from ..models.steering import Instant, Steer
    from ..run import Run, Settings

CARD = Card(
    name="a_star",
    verb="AStar",
    paper="Agarwal, Karanam, Joseph, Saxena, Goswami and Srinivasan, A-STAR: Test-time Attention Segregation and "
    "Retention for Text-to-image Synthesis, ICCV 2023",
    systems=("S004-52",),
    question="Two things asked, one drawn: can the attention be pulled apart while sampling?",
    units=("concept word",),
    works_on=("Stable Diffusion 1 and 2, SDXL",),
    needs=("cross-attention", "gradients"),
    cost="one more model run and one gradient for each steered step",
    claim="On prompts of which the model draws one object twice and leaves the other out, the two losses bring both "
    "onto the picture for the same seeds, where a push of the same size in a random direction does not.",
    falsifier={
        "trial": "shapes.both.measure",
        "planted": "prompts of two objects that the model is known to fail, found on other seeds; the oracle reads "
        "whether exactly the two are there",
        "expect": 0.3,
        "control": "the same seeds unsteered; a random direction of the same length at every step",
        "seconds": 110,
    },
    departs="Equation numbers and the threshold of B (half of the maximum) are from memory. Maps are divided by their "
    "highest value first (``normalise``), which a small model needs; alpha and the share of steered steps are this "
    "model's too. Maps are of the layers with ``size`` places each way. Small-scale.",
    avoid="To say that it is the objects' attention that has to be pulled apart: on 8 seeds the losses of two words "
    "that name no object did nearly as well (.53 against .59; unsteered .19, a random direction .09), on the 8 others "
    "of the trial they did not (.25), so they stand in its details and not among its controls. Where the model draws "
    "both already: there steering does harm (a third object, a colour that spills). A steered picture is no longer "
    "what the model gives for its seed, so it is not a Run to replay.",
)


@dataclass(frozen=True)
class AStar:
    """``words``: the concepts C, as words of the prompt (each must stand there once) or their numbers. ``alpha``: the
    step, in latents per unit of loss. ``share``: of the steps, from the first, that are steered. ``size``: height of
    the attention grids that are read (None: see `Instant.maps`)."""

    words: tuple[str | int, ...]
    alpha: float = 100.0
    share: float = 0.8
    size: int | None = None
    retention: bool = True
    normalise: bool = True

    def steer(self, model: Any, many: Sequence[Settings], batch: int = 16) -> list[Run]:
        """Pictures of these settings, steered. Raises MethodError, RunError, PromptError before any work."""
        from ..models.steering import pictures

        return pictures(model, many, self.words, self.steering(model), batch)

    def steering(self, model: Any) -> Steer:
        """The change of the latents before each step."""
        import torch

        from ..models.steering import numbers_of

        if len(self.words) < 2 or not self.alpha > 0 or not 0 < self.share <= 1:
            found = f"{len(self.words)} words, alpha {self.alpha:g}, share {self.share:g}"
            raise MethodError("A-STAR", found, "two words or more, alpha above 0, a share above 0 and up to 1")
        before: list[Tensor] = []

        def steer(now: Instant) -> Tensor | None:
            if now.step == 0:
                before.clear()
            if now.step >= self.share * now.steps:
                return None
            z = now.latents.requires_grad_(True)
            places = torch.tensor([numbers_of(model, prompt, self.words) for prompt in now.prompts])
            a = now.maps(z, self.size)[torch.arange(len(z))[:, None], places]
            if self.normalise:
                a = a / a.detach().amax((-1, -2), keepdim=True)
            loss = segregation(a)
            if self.retention:
                loss = loss + (retention(a, before.pop()) if before else 0)
                before.append((a.detach() >= a.detach().amax((-1, -2), keepdim=True) / 2).to(a.dtype))
            (slope,) = torch.autograd.grad(loss.sum(), z)
            return (z - self.alpha * slope).detach()

        return steer


def segregation(a: Tensor) -> Tensor:
    """L_seg of maps [image, concept, y, x]: [image]."""
    import torch

    pairs = [(m, n) for m in range(a.shape[1]) for n in range(m)]
    both = [torch.minimum(a[:, m], a[:, n]).sum((-1, -2)) / (a[:, m] + a[:, n]).sum((-1, -2)) for m, n in pairs]
    return torch.stack(both).sum(0)


def retention(a: Tensor, b: Tensor) -> Tensor:
    """L_ret of maps and of the places that were theirs a step before, both [image, concept, y, x]: [image]."""
    import torch

    return (1 - torch.minimum(a, b).sum((-1, -2)) / (a + b).sum((-1, -2))).sum(1)
