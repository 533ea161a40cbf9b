"""Two objects asked, one drawn twice: prompts of the `shapes` model that fail so, and what steering makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...engine.randomness import torch_stream
from ...run import Run, Settings
from ...score import Score
from ..measured import Measured
from .oracle import judge, parse, read

if TYPE_CHECKING:
    from torch import Tensor

    from ...engine.progress import Advance
    from ...models.steering import Instant, Steer

PROMPTS: tuple[tuple[str, str, str], ...] = (
    ("a red square and a red circle on sand", "square", "circle"),
    ("a red square and a red circle on moss", "square", "circle"),
    ("a yellow square and a yellow circle on sand", "square", "circle"),
    ("a yellow circle and a yellow cross", "circle", "cross"),
)
"""(prompt, object, object): prompts for two objects of one colour that the model drew wrong at five of six other seeds,
or at all six. Settings were chosen on "a red square and a red circle"."""
FIRST = 5000
"""Seeds from here on: settings were chosen on smaller ones."""


OTHER_WORDS = "the words that name no object"


def present(run: Run) -> bool:
    """Whether exactly the objects that were asked for are on the picture."""
    return judge(parse(run.settings.prompt), read(run.images[0]))["objects"]


def random_direction(steer: Steer, name: str) -> Steer:
    """Pushes as far as ``steer`` does at each step, picture by picture, somewhere else."""
    import torch

    def push(now: Instant) -> Tensor | None:
        new = steer(now)
        if new is None:
            return None
        length = (new - now.latents.detach()).flatten(1).norm(dim=1)
        where = torch.randn(new.shape, generator=torch_stream("both", name, now.step)).to(new)
        pushed: Tensor = now.latents.detach() + where * (length / where.flatten(1).norm(dim=1))[:, None, None, None]
        return pushed

    return push


def measure(verb: Callable[..., Any], replicates: int, model: Any = None, advance: Advance | None = None) -> Measured:
    """The share of prompts with both objects on the picture, seed by seed (half as many seeds as ``replicates``, as
    there are several prompts): steered; as it comes; pushed as far in a random direction. Beside them, in the details,
    steered by two words that name no object: does it matter whose attention is pulled apart?
    """
    if model is None:
        from ... import load

        model = load()
    seeds = range(FIRST, FIRST + max(replicates // 2, 2))
    tall, wide = model.default_size
    arms: dict[str, np.ndarray] = {}

    def rate(arm: str, make: Callable[[Sequence[Settings], tuple[str, str]], list[Run]]) -> None:
        found = []
        for prompt, one, other in PROMPTS:
            many = [Settings(prompt, s, model.steps, model.guidance, tall, wide) for s in seeds]
            found.append([present(run) for run in make(many, (one, other))])
            if advance:
                advance(0, f"{arm}: {prompt}")
        arms[arm] = np.mean(found, 0)

    rate("steered", lambda many, words: verb(words=words).steer(model, many))
    rate("unsteered", lambda many, _: model.generate_many(many))
    rate(
        "a random direction, as far",
        lambda many, words: model.generate_many(
            many, steer=random_direction(verb(words=words).steering(model), many[0].prompt)
        ),
    )
    rate(OTHER_WORDS, lambda many, _: verb(words=(0, 3)).steer(model, many))
    others = Score.of("steered by words that name no object", "share of prompts", arms.pop(OTHER_WORDS))
    gain = Score.of("above unsteered", "share of prompts, paired by seed", arms["steered"] - arms["unsteered"])
    return Measured(
        "both objects are there", "share of prompts", "seed", tuple(arms.pop("steered")),
        {name: tuple(values) for name, values in arms.items()},
        details={"prompts": [p for p, *_ in PROMPTS], "gain": gain.record(), "other words": others.record()},
    )  # fmt: skip
