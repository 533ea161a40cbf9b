"""Sampling that is steered: before each denoiser pass its latents are shown, with gradients, and may be changed.

The pipeline runs its own loop. A hook before the denoiser shows the pass; what comes back replaces the latents in that
pass and in the scheduler's step behind it. A steer that changes nothing leaves the picture as it is, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..engine.attention import AttentionTape
from ..errors import MethodError, RunError
from .moments import Moment

if TYPE_CHECKING:
    from ..run import Run, Settings

_LATENTS = ("hidden_states", "sample")


@dataclass(frozen=True)
class Instant:
    """Before pass number ``step`` of ``steps``. ``latents`` [image, channel, y, x] as the scheduler holds them.

    ``prompts[image]``; ``columns[image][word]``: places of a word on the text axis.
    """

    step: int
    steps: int
    latents: Tensor
    prompts: tuple[str, ...]
    columns: tuple[tuple[tuple[int, ...], ...], ...]
    moment: Moment
    scale: float

    def maps(self, latents: Tensor, size: int | None = None) -> Tensor:
        """The words' attention [image, word, y, x] with these latents, mean over heads and over the layers whose grid
        is ``size`` places high (None: the coarsest but one, which is 16 x 16 of Stable Diffusion 1, as papers on it
        have). One denoiser pass; differentiable in ``latents``. Raises RunError for a size that no layer has.
        """
        heights = sorted({layer.height for layer in self.moment.layers})
        size = heights[min(1, len(heights) - 1)] if size is None else size
        if size not in heights:
            raise RunError(f"attention on grids {size} places high", "no layer has one", ", ".join(map(str, heights)))
        tape = AttentionTape(keep=("layer",), mode="grad")
        self.moment.predict(latents * self.scale, tape=tape, columns=self.columns)
        found = []
        for image in range(len(latents)):
            chosen = [m.values[0, 0] for m in tape.layers(image) if m.height == size]
            found.append(torch.stack(chosen).mean(0))
        return pad_sequence(found, batch_first=True)


Steer = Callable[[Instant], Tensor | None]
"""New latents for this pass, or None to leave them."""


@contextmanager
def steered(
    pipeline: Any, denoiser: torch.nn.Module, steer: Steer, of: Callable[[tuple[Any, ...], dict[str, Any]], Moment],
    prompts: tuple[str, ...], columns: tuple[tuple[tuple[int, ...], ...], ...], calls: int,
) -> Iterator[None]:  # fmt: skip
    """Puts ``steer`` on a pipeline for one batch; ``of`` makes a Moment of a pass's arguments."""
    scheduler, own_step = pipeline.scheduler, pipeline.scheduler.step
    state: dict[str, Any] = {"step": -1, "inside": False, "new": None}

    def before(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if state["inside"]:  # a pass that the steer itself asked for
            return None
        state["step"] += 1
        moment = of(args, kwargs)
        time = kwargs["timestep"] if len(args) < 2 else args[1]
        scale = 1.0
        if hasattr(scheduler, "scale_model_input"):
            scale = float(scheduler.scale_model_input(torch.ones(1, device=moment.latents.device), time.flatten()[0]))
        state["inside"] = True
        try:
            with torch.enable_grad():
                latents = (moment.latents / scale if scale != 1 else moment.latents).detach()
                new = steer(Instant(state["step"], calls, latents, prompts, columns, moment, scale))
        finally:
            state["inside"] = False
        state["new"] = None if new is None else new.detach()
        if new is None:
            return None
        shown = state["new"] * scale if scale != 1 else state["new"]
        named = next((n for n in _LATENTS if n in kwargs), None)
        rows = len(kwargs[named] if named else args[0])
        shown = torch.cat([shown] * (rows // len(shown)))
        return ((args if named else (shown, *args[1:])), kwargs | ({named: shown} if named else {}))

    @wraps(own_step)  # pipelines read its signature
    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        new, state["new"] = state["new"], None
        return own_step(model_output, timestep, sample if new is None else new.to(sample.dtype), *args, **kwargs)

    handle = denoiser.register_forward_pre_hook(before, with_kwargs=True)
    scheduler.step = step
    try:
        yield
    finally:
        handle.remove()
        del scheduler.step


def pictures(model: Any, many: Sequence[Settings], words: Sequence[str | int], steer: Steer, batch: int) -> list[Run]:
    """Steered pictures of these settings, once every prompt is known to have the words."""
    for prompt in {s.prompt for s in many}:
        numbers_of(model, prompt, words)
    runs: list[Run] = model.generate_many(many, batch=batch, steer=steer)
    return runs


def numbers_of(model: Any, prompt: str, words: Sequence[str | int]) -> list[int]:
    """Their numbers in the prompt. Raises MethodError for a word that does not stand there once."""
    names = model.words(prompt).names
    return [word_number(w, names, prompt) for w in words]


def word_number(word: str | int, names: Sequence[str], prompt: str) -> int:
    """The word's number in the prompt. Raises MethodError unless it stands there once."""
    if isinstance(word, int):
        if not 0 <= word < len(names):
            raise MethodError(f"word {word} of {prompt!r}", f"it has {len(names)} words", "words from 0")
        return word
    found = [i for i, name in enumerate(names) if name.lower() == word.lower()]
    if len(found) != 1:
        said = f"it stands there {len(found)} times" if found else "it does not stand there"
        raise MethodError(f"the word {word!r} of {prompt!r}", said, f"one of {', '.join(names)}, or a word's number")
    return found[0]
