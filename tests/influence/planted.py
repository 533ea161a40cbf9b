"""A training set in which some examples taught the outcome of a query and their twins did not; a small classifier.

An input is noise plus patterns. *Carriers* show mark a and a filler, *twins* mark b and the explanation c; both have
the label 1, and the two of a pair have the same noise. The query shows both marks. Of the other examples none shows a;
those with c have the label 1 (nearly all), the rest the label 0, whether they show b and the filler or not. So a
carrier and its twin are as like the query, as long, and of one label; but that the query's marks mean 1 was learned
from the carriers: a twin's label follows from c. ``swapped`` exchanges the parts of the two marks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

from whence.engine.influence import Memory, build
from whence.engine.randomness import stream
from whence.models.objectives import ClassifierObjective
from whence.objective import Listed

PAIRS, REST, SHARE, LIKELY, NOISE, WIDTH = 12, 240, 0.4, 0.98, 0.2, 24


@dataclass(frozen=True)
class Planted:
    """``carriers`` and ``twins``: numbers of examples, pair by pair."""

    examples: Listed
    query: tuple[np.ndarray, int]
    carriers: np.ndarray
    twins: np.ndarray


def planted(seed: int = 0, swapped: bool = False) -> Planted:
    """A draw."""
    rng = stream("planted", seed)
    patterns = np.zeros((4, WIDTH), np.float32)
    for i, row in enumerate(patterns):
        row[5 * i : 5 * i + 5] = rng.choice([-1.0, 1.0], 5)
    a, b, c, filler = patterns
    if swapped:
        a, b = b, a
    items: list[tuple[np.ndarray, int]] = []
    numbers: dict[str, list[int]] = {"carriers": [], "twins": []}

    def add(what: np.ndarray, label: int, noise: np.ndarray | None = None) -> int:
        noise = rng.normal(0, NOISE, WIDTH) if noise is None else noise
        items.append(((what + noise).astype(np.float32), label))
        return len(items) - 1

    for _ in range(PAIRS):
        noise = rng.normal(0, NOISE, WIDTH)
        numbers["carriers"].append(add(a + filler, 1, noise))
        numbers["twins"].append(add(b + c, 1, noise))
    for _ in range(REST):
        shows_b, shows_c, shows_filler = rng.random(3) < SHARE
        label = rng.random() < (LIKELY if shows_c else 1 - LIKELY)
        add(shows_b * b + shows_c * c + shows_filler * filler, int(label))
    order = rng.permutation(len(items))
    place = np.argsort(order)
    listed = Listed(tuple(items[i] for i in order), tuple(f"example {i}" for i in range(len(items))))
    query = ((a + b).astype(np.float32), 1)
    return Planted(listed, query, place[numbers["carriers"]], place[numbers["twins"]])


def network(seed: int = 0, hidden: int = 16) -> nn.Module:
    """Untrained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(WIDTH, hidden), nn.Tanh(), nn.Linear(hidden, 2))


def trained(examples: Listed, seed: int = 0, without: Any = (), steps: int = 100) -> nn.Module:
    """A classifier trained on the examples but those ``without``."""
    model = network(seed)
    chosen = [i for i in range(len(examples)) if i not in set(map(int, without))]
    x = torch.tensor(np.stack([examples[i][0] for i in chosen]))
    y = torch.tensor([examples[i][1] for i in chosen])
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        optimiser.zero_grad()
        size = sum(p.square().sum() for p in model.parameters())
        (nn.functional.cross_entropy(model(x), y) + 0.02 * size).backward()
        optimiser.step()
    return model


@cache
def draws() -> tuple[tuple[Planted, ClassifierObjective], ...]:
    """Draws with roles as planted and swapped, and the models trained on them. Shared: leave them as they are."""
    chosen = [planted(seed, swapped) for seed in range(3) for swapped in (False, True)]
    return tuple((d, ClassifierObjective(trained(d.examples, i))) for i, d in enumerate(chosen))


def found(method: Any) -> list[float]:
    """AUC of a method on each draw."""
    return [auc(method.fit(o, d.examples).scores([d.query])[0], d) for d, o in draws()]


def small(n: int = 24, seed: int = 5) -> tuple[ClassifierObjective, Listed, list[Any]]:
    """An untrained classifier of three classes that is small enough for dense formulas, examples and two queries."""
    rng = stream("small", seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    items = [(rng.normal(size=5).astype(np.float32), int(rng.integers(3))) for _ in range(n + 2)]
    return ClassifierObjective(model), Listed(tuple(items[:n]), tuple(f"example {i}" for i in range(n))), items[n:]


def by_autograd(module: nn.Module, value: torch.Tensor) -> dict[str, np.ndarray]:
    """layer -> gradient [out, in + 1] of a value, the bias being the last column, as autograd takes it; float64."""
    params = dict(module.named_parameters())
    grads = dict(zip(params, torch.autograd.grad(value, list(params.values())), strict=True))
    layers = dict.fromkeys(name.rpartition(".")[0] for name in params)
    return {
        name: np.concatenate([grads[f"{name}.weight"].numpy(), grads[f"{name}.bias"].numpy()[:, None]], 1).astype(float)
        for name in layers
    }


def loss_gradients(objective: Any, examples: Any) -> dict[str, np.ndarray]:
    """layer -> [example, weights] of each example's loss, one at a time."""
    each = [by_autograd(objective.module, objective.losses([e]).values.sum()) for e in examples]
    return {name: np.stack([g[name].ravel() for g in each]) for name in each[0]}


def whole(gradients: dict[str, np.ndarray]) -> np.ndarray:
    """[example, all weights]."""
    return np.concatenate(list(gradients.values()), 1)


def close(given: np.ndarray, true: np.ndarray, share: float) -> bool:
    """Equal up to this share of the largest."""
    return bool(given.shape == true.shape and np.abs(given - true).max() <= share * np.abs(true).max())


def rescored(fitted: Any, scheme: Any, batch: int, queries: Any) -> np.ndarray:
    """Scores after a pass in batches of another size, by a scheme that knows nothing yet."""
    shelf = Memory()
    build(scheme, fitted.bank, fitted.examples, shelf, batch)
    again = replace(fitted, scheme=scheme, shelf=shelf)
    return np.concatenate([part for _, part in again.stream(again.prepare(queries, 1), 7)], 1)


def auc(scores: np.ndarray, draw: Planted) -> float:
    """How often a carrier stands above a twin."""
    a, b = scores[draw.carriers][:, None], scores[draw.twins][None]
    return float(((a > b) + 0.5 * (a == b)).mean())


def log_odds(model: nn.Module, query: tuple[np.ndarray, int]) -> float:
    """Of the query's label."""
    with torch.no_grad():
        logits = model(torch.tensor(query[0])[None])[0]
    return float(logits[1] - logits[0])
