"""What can this diffusion model vary, found without words?

A direction d_k stands where a prompt's embedding would: what it does to a noisy picture x_t is the change of what the
denoiser says of it (Dalva and Yanardag 2024, section 3.2),

    D_k^n = eps(x_t^n, d_k) - eps(x_t^n, none),      n a picture of N, k a direction of K.

A direction should do the same to all pictures, and no other direction the same. So the loss of direction k is

    L_k = - log  sum over a, b of [a != b] exp(sim(D_k^a, D_k^b) / tau)
                 ------------------------------------------------------
                 sum over n, j of [j != k] exp(sim(D_k^n, D_j^n) / tau)

with sim the cosine and tau the temperature: pictures of one direction attract, directions on one picture repel. Only
the d_k learn. One is applied while a picture is made, or several at once, each with its strength lambda (section 3.3):

    eps~ = eps(x_t, none) + g (eps(x_t, c) - eps(x_t, none)) + sum over k of lambda_k (eps(x_t, d_k) - eps(x_t, none))

Whoever has a judge of pictures names them afterwards by what changes when they are applied at the same seeds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..engine.descent import descend
from ..engine.randomness import seed_of, stream, torch_stream
from ..errors import MethodError, RunError
from ..method import Card
from ..models.objectives import DiffusionObjective

if TYPE_CHECKING:
    from ..engine.progress import Advance
    from ..run import Run, Settings

CARD = Card(
    name="noiseclr",
    verb="NoiseCLR",
    paper="Dalva and Yanardag, NoiseCLR: A Contrastive Learning Approach for Unsupervised Discovery of Interpretable "
    "Directions in Diffusion Models, CVPR 2024",
    systems=("S002-70",),
    question="What can this diffusion model vary, found without words?",
    units=("direction",),
    works_on=("Stable Diffusion 1 and 2",),
    needs=("guidance",),
    cost="steps x pictures x (directions + 1) denoiser rows to learn, with gradients; one row more per step for "
    "each direction that is applied",
    claim="A learned direction changes one attribute of a picture and no other more often than a random one.",
    falsifier={
        "trial": "shapes.directions.measure",
        "planted": "the attributes of the world's pictures, which nothing of the training is told",
        "expect": 0.2,
        "control": "random directions of equal norm, and random ones that change the noise as much",
        "seconds": 140,
        "status": "not shown",
        "reason": "It beats random directions of equal norm, not random ones made as strong as the learned. 60 "
        "pictures each of two trainings, six directions: .26 and .26 change the attribute of their name alone, random "
        "ones of equal norm .12 and .11, random ones of equal change .21 and .26 (an earlier look at 16 had .26, .08, "
        ".15).",
    },
    departs="Small-scale: few directions, some tens of steps, one timestep a step. A direction is an offset to the "
    "states of the empty prompt, all tokens of it. Two of six directions draw another background in every picture, one "
    "of them hardly anything else; the others do little, so that it is not shown either that directions of different "
    "attributes combine.",
    avoid="To look for an attribute that is known beforehand: ask for it in words.",
)


@dataclass(frozen=True)
class NoiseCLR:
    """Settings. ``directions``: K; ``pictures``: N of a step; ``temperature``: tau; ``size``: norm of a direction at
    the start, in norms of the empty prompt's states; ``span``: the part of the schedule, from clean (0) to noise (1),
    that timesteps are drawn from."""

    directions: int = 6
    pictures: int = 4
    temperature: float = 0.5
    steps: int = 40
    rate: float = 0.03
    size: float = 1.0
    span: tuple[float, float] = (0.3, 1.0)
    seed: int = 0

    def fit(
        self, model: Any, pictures: Sequence[Any], path: Path | None = None, advance: Advance | None = None
    ) -> Directions:
        """Learn from pictures without labels: uint8 [y, x, rgb], or latents [channel, y, x].

        ``path``: a safetensors file that a stopped training goes on from. Raises MethodError for settings that give no
        contrast, ModelError for a model that takes more than a prompt and a time.
        """
        self._check(len(pictures))
        objective = DiffusionObjective(model)
        latents = torch.stack([objective.latents(p) for p in pictures])
        none = objective.read("").to(latents)
        d = _start(self, none).requires_grad_()
        about = seed_of("noiseclr", asdict(self), model.fingerprint, float(latents.double().sum()))
        trained = {n: p.requires_grad for n, p in objective.module.named_parameters()}
        objective.module.requires_grad_(False)
        began = time.perf_counter()

        def loss(step: int) -> Tensor:
            return self._loss(objective, latents, none, d, step)

        try:
            losses = descend({"d": d}, loss, self.steps, self.rate, about, path=path, advance=advance)
        finally:
            for name, p in objective.module.named_parameters():
                p.requires_grad_(trained[name])
        return Directions(model, none, d.detach(), asdict(self), tuple(losses), time.perf_counter() - began)

    def _check(self, pictures: int) -> None:
        if self.directions < 2 or self.pictures < 2 or pictures < self.pictures:
            raise MethodError(
                f"{self.directions} directions from {pictures} pictures, {self.pictures} a step",
                "nothing to contrast", "2 directions or more, and 2 pictures or more a step",
            )  # fmt: skip

    def _loss(self, objective: DiffusionObjective, latents: Tensor, none: Tensor, d: Tensor, step: int) -> Tensor:
        rng = stream("noiseclr", self.seed, step)
        pick = torch.from_numpy(rng.choice(len(latents), self.pictures, replace=False))
        total = len(objective.alphas)
        t = min(int((self.span[0] + (self.span[1] - self.span[0]) * rng.random()) * total), total - 1)
        x0 = latents[pick]
        noise = torch.randn(x0.shape, generator=torch_stream("noiseclr", self.seed, step)).to(x0)
        alpha = objective.alphas[t].to(x0)
        x = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
        return contrast(changes(objective.module, x, t, none, d), self.temperature)


def changes(denoiser: Any, x: Tensor, t: int, none: Tensor, d: Tensor) -> Tensor:
    """D[direction, picture, feature]: what each direction changes in the prediction for each noisy picture.

    Of a denoiser that predicts v or the picture, the change of its output is that of eps times a number of t alone,
    which the cosine does not see.
    """
    n, k = len(x), len(d)
    at = torch.full((n,), t, device=x.device)
    with torch.no_grad():
        plain = denoiser(x, at, none.expand(n, *none.shape), return_dict=False)[0]
    asked = (none + d).repeat_interleave(n, 0)
    said = denoiser(x.repeat(k, 1, 1, 1), at.repeat(k), asked, return_dict=False)[0]
    found: Tensor = (said.view(k, n, *plain.shape[1:]) - plain).flatten(2)
    return found


def contrast(D: Tensor, tau: float) -> Tensor:
    """The mean over directions of L_k, for D[direction, picture, feature]."""
    unit = torch.nn.functional.normalize(D, dim=-1)
    k, n = unit.shape[:2]
    same = torch.einsum("kaf,kbf->kab", unit, unit) / tau
    other = torch.einsum("knf,jnf->kjn", unit, unit) / tau
    same = same.masked_fill(torch.eye(n, dtype=torch.bool, device=D.device), -math.inf)
    other = other.masked_fill(torch.eye(k, dtype=torch.bool, device=D.device)[..., None], -math.inf)
    return (other.flatten(1).logsumexp(1) - same.flatten(1).logsumexp(1)).mean()


def _start(settings: NoiseCLR, none: Tensor) -> Tensor:
    drawn = torch.randn(settings.directions, *none.shape, generator=torch_stream("noiseclr", settings.seed, "start"))
    length = settings.size * float(none.norm()) / drawn.flatten(1).norm(dim=1)
    start: Tensor = (drawn * length[:, None, None]).to(none)
    return start


@dataclass(frozen=True)
class Directions:
    """Learned directions ``d[direction, token, feature]``, offsets to the states ``none`` of the empty prompt."""

    model: Any
    none: Tensor
    d: Tensor
    settings: dict[str, Any]
    losses: tuple[float, ...] = ()
    seconds: float = 0.0

    def random(self, key: object = 0) -> Directions:
        """As many random directions, each with the norm of one of these."""
        drawn = torch.randn(self.d.shape, generator=torch_stream("random directions", key)).to(self.d)
        length = self.d.flatten(1).norm(dim=1) / drawn.flatten(1).norm(dim=1)
        return Directions(self.model, self.none, drawn * length[:, None, None], self.settings | {"random": str(key)})

    def reach(self, pictures: Sequence[Any], t: float = 0.7) -> list[float]:
        """How far each direction moves the prediction for these pictures at ``t`` of the schedule: mean norm."""
        objective = DiffusionObjective(self.model)
        x0 = torch.stack([objective.latents(p) for p in pictures])
        at = int(t * len(objective.alphas))
        alpha = objective.alphas[at].to(x0)
        noise = torch.randn(x0.shape, generator=torch_stream("reach")).to(x0)
        with torch.no_grad():
            D = changes(objective.module, alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise, at, self.none, self.d)
        return [float(v) for v in D.norm(dim=-1).mean(1)]

    def apply(
        self,
        many: Sequence[Settings],
        strengths: Sequence[Mapping[int, float]],
        batch: int = 16,
        until: float = 1.0,
    ) -> list[Run]:
        """Make pictures, each with its own directions: ``strengths[picture]`` maps a direction's number to lambda.

        ``until``: from this part of the schedule down (1: all of it). Where things stand is decided first, so that a
        direction that comes in at .8 leaves them in their places.
        """
        wrong = sorted({k for s in strengths for k in s if not 0 <= k < len(self.d)})
        if wrong:
            raise RunError(f"direction {wrong[0]}", f"there are {len(self.d)}", f"0 to {len(self.d) - 1}")
        alike = {(s.steps, s.guidance, s.height, s.width, s.negative_prompt, s.images) for s in many}
        if len(many) != len(strengths) or len(alike) > 1 or any(s.images > 1 for s in many):
            found = f"{len(many)} pictures, {len(strengths)} strengths, {len(alike)} kinds of settings"
            raise RunError("pictures with directions", found, "one mapping and one image each, settings alike")
        runs: list[Run] = []
        for i in range(0, len(many), batch):
            part = many[i : i + batch]
            with self._on(strengths[i : i + batch], self.model.guided(part[0]), until):
                runs += self.model.generate_many(part, batch=batch)
        return runs

    @contextmanager
    def _on(self, strengths: Sequence[Mapping[int, float]], guided: bool, until: float) -> Iterator[None]:
        """Adds the directions to what the denoiser says; unconditional rows, which come first, are those of "none"."""
        rows = [(row, k, lam) for row, s in enumerate(strengths) for k, lam in s.items() if lam]
        n = len(strengths)
        latest = until * len(self.model.pipeline.scheduler.alphas_cumprod)
        busy = False

        def add(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
            nonlocal busy
            if busy or not rows:
                return out
            said = out[0] if isinstance(out, tuple) else out.sample
            x, t = args[0], args[1]
            if float(t) >= latest:
                return out
            own = torch.tensor([r for r, _, _ in rows])
            asked = self.none + self.d[[k for _, k, _ in rows]]
            lam = torch.tensor([v for _, _, v in rows]).to(said).view(-1, 1, 1, 1)
            busy = True
            try:
                with torch.no_grad():
                    moved = module(x[own], t, asked.to(x), return_dict=False)[0]
                    plain = (
                        said[:n]
                        if guided
                        else module(x[:n], t, self.none.expand(n, *self.none.shape).to(x), return_dict=False)[0]
                    )
            finally:
                busy = False
            change = torch.zeros_like(plain).index_add(0, own, lam * (moved - plain[own]))
            said = said + (change.repeat(2, 1, 1, 1) if guided else change)
            return (said, *out[1:]) if isinstance(out, tuple) else type(out)(sample=said)

        handle = self.model.denoiser.register_forward_hook(add, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
