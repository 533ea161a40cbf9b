"""Do these training examples teach the model this output? Take a step of training on each, and look.

From the trained weights, one step of gradient descent on example i alone (Chang et al. 2024, tail patch):

    fall_i = L_q(theta) - L_q(theta - eta grad L_i(theta))

as a share of the query's loss L_q. The step is of one length for all: eta is such that, to first order, a step lowers
the loss of the median example by a twentieth. The replicates are the named examples; the controls are as many examples
drawn at random, three times. No retraining: it tests what an example teaches *now*, which a gradient method should know
best, not what would be gone without it (that is leave_k_out).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import RunError
from ..method import Card
from ..verdict import Verdict, judge_run

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..objective import Examples, Objective

CARD = Card(
    name="tail_patch",
    verb="tail_patch",
    paper="Chang et al. 2024, Scalable Influence and Fact Tracing for Large Language Model Pretraining",
    systems=(),
    question="Does a step of training on the named examples make this output more likely?",
    units=("training example",),
    works_on=("language models", "diffusion models", "classifiers", "graph nets"),
    needs=("training examples",),
    cost="two forwards and one backward for each of 4 k examples",
    claim="Examples that taught an outcome are supported; examples drawn at random are not.",
    falsifier={
        "trial": "tests/checks/test_tail_patch.py::test_examples_that_teach_are_supported_and_others_are_not",
        "planted": "a class of digits that few examples stand for",
        "expect": 0.9,
        "control": "examples drawn at random, named in their place: supported at most one time in ten",
        "seconds": 10,
    },
    departs="One example per step, plain gradient descent, a step length taken from the examples themselves; the "
    "number is the fall of the loss as a share of it, where the paper has the gain of the answer's "
    "probability.",
    avoid="As proof that an output would be gone without the examples: many can teach what any few do.",
)

SHARE = 0.05
"""Of its own loss that a step takes off the median example."""
WORTH = 0.001
"""Smallest fall worth having, as a share of the query's loss: a fiftieth of what the step does for its own example."""
DRAWS = 3


def tail_patch(
    named: Sequence[int], objective: Objective, examples: Examples, query: Any, seed: int = 0, delta: float = WORTH
) -> Verdict:
    """The verdict on these examples (numbers) for a query. Raises RunError for fewer than three, or too few others."""
    from ..engine.randomness import stream

    chosen = [int(i) for i in named]
    others = np.setdiff1d(np.arange(len(examples)), chosen)
    if len(chosen) < 3 or len(others) < 3:
        raise RunError(
            f"a trial of {len(chosen)} examples", f"{len(others)} others to compare with", "three or more of both"
        )
    dice = stream("tail patch", seed, *chosen)
    drawn = [dice.choice(others, min(len(chosen), len(others)), replace=False) for _ in range(DRAWS)]
    falls = _falls([*chosen, *(int(i) for d in drawn for i in d)], objective, examples, query)
    k, controls, at = len(chosen), {}, len(chosen)
    for number, d in enumerate(drawn, 1):
        controls[f"random examples, {number}"] = falls[at : at + len(d)]
        at += len(d)
    return judge_run(
        falls[:k], controls,
        claim=f"training on {_names(chosen, examples)} makes this output more likely",
        delta=delta, readout="fall of the query's loss after one step on one example", unit="share of the loss",
        intervention=f"one step of gradient descent on each of {k} examples, and on {DRAWS} x {k} drawn at random",
        evidence=f"they were named as the {k} that made it most likely",
    )  # fmt: skip


def _names(chosen: list[int], examples: Examples) -> str:
    first = f"“{examples.label(chosen[0])}”"
    return f"{first} and {len(chosen) - 1} more" if len(chosen) > 1 else first


def _falls(numbers: list[int], objective: Objective, examples: Examples, query: Any) -> NDArray[np.float64]:
    """Share of the query's loss that a step on each example takes off."""
    import torch

    weights = list(objective.module.parameters())
    flags = [p.requires_grad for p in weights]
    try:
        for p in weights:
            p.requires_grad_(True)

        def loss(example: Any) -> Any:
            return objective.losses([example]).values.sum()

        def gradient(number: int) -> tuple[float, list[Any], float]:
            with torch.enable_grad():
                value = loss(examples[number])
            found = torch.autograd.grad(value, weights, allow_unused=True)
            return (
                float(value.detach()),
                list(found),
                float(sum(g.double().pow(2).sum() for g in found if g is not None)),
            )

        measured = [gradient(i)[::2] for i in numbers[: min(len(numbers), 16)]]
        steps = [value / square for value, square in measured if square > 0 and math.isfinite(value / square)]
        if not steps:
            raise RunError("a step of training", "no example has a gradient", "examples with a finite loss")
        eta = SHARE * float(np.median(steps))
        with torch.no_grad():
            before = float(loss(query))
        if not (math.isfinite(before) and before > 0):
            raise RunError("the query's loss", f"it is {before}", "a query with a finite loss above 0")
        found = []
        for number in numbers:
            moves = [None if g is None else eta * g for g in gradient(number)[1]]
            with torch.no_grad():
                kept = [p.detach().clone() if m is not None else None for p, m in zip(weights, moves, strict=True)]
                try:
                    for p, m in zip(weights, moves, strict=True):
                        if m is not None:
                            p.sub_(m)
                    after = float(loss(query))
                finally:
                    for p, old in zip(weights, kept, strict=True):
                        if old is not None:
                            p.copy_(old)
            # An example whose step breaks the model teaches it nothing.
            found.append((before - after) / before if math.isfinite(after) else -1.0)
        return np.array(found)
    finally:
        for p, flag in zip(weights, flags, strict=True):
            p.requires_grad_(flag)
