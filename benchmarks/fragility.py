"""Do influence scores agree with training again less in deeper and wider networks, and without weight decay?

scikit-learn's digits, 500 of them. A base network (2 hidden layers, 32 wide, weight decay 1e-3) is varied in one thing
at a time: 0 to 4 hidden layers, 8 to 128 wide, decay 0 to 1e-2. For every setting and seed the model is trained again,
from the same first weights, on random halves (LDS) and without single examples chosen at random ("leave one out"); a
method's agreement is the mean over queries of Spearman's correlation, and the replicate is the seed. Controls: shuffled
scores, and what the noise of training alone would explain (see `whence.checks.fragility`).

    python -m benchmarks.fragility --json [--write] [--quick]

What was trained is kept in out/fragility, so that a stopped run goes on.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.recording import arguments, publish
from whence.checks.fragility import Retrained, Setting, Trained, fragility
from whence.engine.progress import progress
from whence.engine.randomness import stream
from whence.influence.ekfac import EKFAC
from whence.influence.grad_dot import GradDot
from whence.worlds.digits import RECIPE, Digits, digits, halves

FOLDER = Path("out/fragility")
METHODS: dict[str, Any] = {"ekfac": EKFAC(), "grad_dot": GradDot()}
BASE = Setting(2, 32, 1e-3)
DEPTHS, WIDTHS, DECAYS = (0, 1, 2, 3, 4), (8, 32, 128), (0.0, 1e-4, 1e-3, 1e-2)


def family(quick: bool) -> list[Setting]:
    """The base, and what differs from it in one thing."""
    depths, widths, decays = ((0, 2, 4), (8, 32), (0.0, 1e-3)) if quick else (DEPTHS, WIDTHS, DECAYS)
    found = [replace(BASE, depth=d) for d in depths]
    found += [replace(BASE, width=w) for w in widths] + [replace(BASE, decay=d) for d in decays]
    return list(dict.fromkeys(found))


class Sweep:
    """Training again, once for all methods. ``taught``: share of queries that the models get right."""

    def __init__(self, examples: int, queries: int, subsets: int, alone: int, seeds: int) -> None:
        self.world, self.subsets, self.seeds = digits(examples, queries), subsets, range(seeds)
        without = np.ones((alone, examples), bool)
        chosen = stream("fragility", "left out").permutation(examples)[:alone]
        without[np.arange(alone), chosen] = False
        self.kept = np.concatenate([halves(examples, subsets, "fragility"), without, np.ones((1, examples), bool)])
        self.outputs: dict[Setting, np.ndarray] = {}
        self.scores: dict[tuple[Setting, int], dict[str, np.ndarray]] = {}

    def network(self, setting: Setting) -> Digits:
        """The world with the network of a setting."""
        hidden, recipe = (setting.width,) * setting.depth, replace(RECIPE, decay=setting.decay)
        return replace(self.world, hidden=hidden, recipe=recipe)

    def train(self, setting: Setting, advance: Any) -> None:
        """All seeds of a setting, and every method's scores."""
        own = self.network(setting)
        steps = own.recipe.steps

        def tell(n: int = 1, note: str = "") -> None:
            advance(n / steps, note)

        self.outputs[setting] = own.retrained(self.kept, self.seeds, FOLDER, tell)
        for seed in self.seeds:
            objective = own.objective(seed)
            self.scores[setting, seed] = {
                name: m.fit(objective, own.examples).scores(own.queries) for name, m in METHODS.items()
            }

    def trained(self, setting: Setting, seed: int, method: str) -> Trained:
        """What the check is told."""
        own, again = self.outputs[setting][seed], self.outputs[setting][(seed + 1) % len(self.seeds)]
        half, single = slice(0, self.subsets), slice(self.subsets, -1)
        truths = {
            name: Retrained(self.kept[rows], own[rows], again[rows])
            for name, rows in (("LDS", half), ("leave one out", single))
        }
        return Trained(self.scores[setting, seed][method], truths)

    def right(self, setting: Setting) -> float:
        """Share of queries that models trained on everything get right."""
        return round(float((self.outputs[setting][:, -1] > 0).mean()), 3)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer settings, halves and examples")
    asked = parser.parse_args()
    sizes = {"examples": 500, "queries": 50, "subsets": 40, "alone": 24, "seeds": 8}
    if asked.quick:
        sizes = {"examples": 200, "queries": 30, "subsets": 24, "alone": 12, "seeds": 6}
    sweep, settings, began = Sweep(**sizes), family(asked.quick), time.perf_counter()
    with progress("fragility", total=len(settings) * sizes["seeds"] * len(sweep.kept), unit="models") as advance:
        for setting in settings:
            sweep.train(setting, advance)
    found = {
        name: fragility(settings, lambda s, seed, name=name: sweep.trained(s, seed, name), sweep.seeds).record()
        for name in METHODS
    }
    result: dict[str, Any] = {
        **sizes,
        "seconds": round(time.perf_counter() - began, 1),
        "right": [{"depth": s.depth, "width": s.width, "decay": s.decay, "share": sweep.right(s)} for s in settings],
        "words": {
            f"{name}, {truth}, {axis}": verdict["word"]
            for name, record in found.items()
            for truth, by in record["verdicts"].items()
            for axis, verdict in by.items()
        },
        "methods": found,
    }
    publish("fragility", result, asked)


if __name__ == "__main__":
    main()
