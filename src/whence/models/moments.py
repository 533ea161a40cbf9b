"""One denoiser pass of a run, held still: its inputs can be changed, and its attention read with gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..engine.capture import Layer, Plan, Recorder
from ..errors import WrongMapError
from .kernels import refuse_caches, through_dispatcher

_LATENTS = ("hidden_states", "sample")


@dataclass(frozen=True)
class Moment:
    """The conditional rows of one pass.

    ``latents``: as the denoiser takes them (scaled for its time; for FLUX packed as [image, place, channel]), else
    [image, channel, y, x]. ``prompt``: embeddings [image, token, feature]. Both can be exchanged in :meth:`predict`.
    """

    denoiser: nn.Module
    latents: Tensor
    prompt: Tensor
    inputs: dict[str, Any]
    layers: tuple[Layer, ...]
    columns: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls,
        denoiser: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        condition: Tensor,
        layers: tuple[Layer, ...],
        columns: tuple[tuple[int, ...], ...],
    ) -> Moment:
        """From the arguments of a pass: unconditional rows, which come first, are left out."""
        inputs = dict(kwargs)
        names = [name for name in _LATENTS if name in inputs]
        latents = inputs.pop(names[0]) if names else args[0]
        inputs["timestep"] = inputs["timestep"] if len(args) < 2 else args[1]
        inputs.pop("encoder_hidden_states")
        rows, images = len(latents), len(condition)

        def own(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: own(v) for k, v in value.items()}
            split = isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows > images
            return value[rows - images :] if split else value

        return cls(denoiser, own(latents), condition, own(inputs), layers, columns)

    def predict(
        self,
        latents: Tensor | None = None,
        prompt: Tensor | None = None,
        tape: Recorder | None = None,
        columns: tuple[tuple[tuple[int, ...], ...], ...] | None = None,
    ) -> Tensor:
        """The denoiser's output for these latents and embeddings (default: the run's own), under a tape if given.
        ``columns``: of each picture, where the pictures' prompts differ.

        With gradients enabled and a tape of ``mode="grad"``, its maps have gradients to both. Use
        ``torch.autograd.grad``: ``backward`` would also fill the gradients of the weights.
        """
        latents = self.latents if latents is None else latents
        prompt = self.prompt if prompt is None else prompt

        def call() -> Tensor:
            return self.denoiser(latents, encoder_hidden_states=prompt, **self.inputs)[0]  # type: ignore[no-any-return]

        if tape is None:
            return call()
        refuse_caches(self.denoiser)
        images = len(prompt)
        tape.rewind()
        each = columns or (self.columns,) * images
        tape.check(self.layers, max(map(len, each)), images, 1)
        plan = Plan(self.denoiser, self.layers, prompt, each, 1)
        with tape.on(plan) as watch, through_dispatcher(watch):
            return call()


class _Enough(Exception):  # noqa: N818, it is no error
    pass


def stop_at(denoiser: nn.Module, step: int, run: Callable[[], None]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of pass number ``step`` while ``run`` runs, which is then stopped."""
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        if len(found) > step:
            raise _Enough

    handle = denoiser.register_forward_pre_hook(look, with_kwargs=True)
    try:
        run()
    except _Enough:
        return found[-1]
    finally:
        handle.remove()
    raise WrongMapError(f"denoiser pass {step}", f"the run took {len(found)}", "an earlier pass")
