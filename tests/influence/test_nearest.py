"""Nearest: cosines of what the model has inside; at chance where likeness is not the cause."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from planted import close, found, small
from sentences import tiny, tokenizer
from torch import nn

from whence.engine.influence import Memory
from whence.errors import MethodError, RunError
from whence.influence.nearest import Nearest
from whence.models.diffusers_unet import StableDiffusion
from whence.models.graphs import undirected
from whence.models.objectives import ClassifierObjective, DiffusionObjective, GraphObjective, LanguageObjective
from whence.models.text import LanguageModel
from whence.models.tiny import stable_diffusion
from whence.objective import Listed


def cosines(a: Any, b: Any) -> np.ndarray:
    a, b = (np.asarray(x, float) / np.linalg.norm(np.asarray(x, float), axis=1, keepdims=True) for x in (a, b))
    return a @ b.T


def test_it_cannot_tell_what_taught_the_outcome_from_its_twins() -> None:
    inputs, inside = found(Nearest(embed=lambda e: e[0])), found(Nearest())
    assert abs(np.mean(inputs) - 0.5) < 0.1
    assert max(inputs) < 0.7
    assert np.mean(inside) < 0.9  # what it has inside was learned, and may point either way
    assert min(inside) < 0.3


def test_by_default_scores_are_cosines_of_what_goes_into_the_last_layer() -> None:
    objective, examples, queries = small()
    with torch.no_grad():
        read = [
            objective.module[:2](torch.tensor(np.stack([x for x, _ in part]))) for part in (queries, examples.items)
        ]
    assert close(Nearest().fit(objective, examples).scores(queries), cosines(*read), 2e-3)


def test_another_layer_or_another_function_may_be_asked() -> None:
    objective, examples, queries = small()
    with torch.no_grad():
        read = [objective.module[0](torch.tensor(np.stack([x for x, _ in part]))) for part in (queries, examples.items)]
    assert close(Nearest(layer="0").fit(objective, examples).scores(queries), cosines(*read), 2e-3)
    raw = [[x for x, _ in part] for part in (queries, examples.items)]
    given = Nearest(embed=lambda e: e[0]).fit(objective, examples)
    assert close(given.scores(queries), cosines(*raw), 2e-3)
    explanation = given.explain(queries[0])
    assert explanation.kind == "similarity"
    assert explanation.units.names[3] == "example 3"


TEXTS = [
    "Anna is in the kitchen.",
    "Where is Anna?",
    "Ben has the key, and Clara took the lamp.",
    "Ben is in the hall.",
]


def test_a_texts_numbers_do_not_depend_on_the_texts_beside_it() -> None:
    objective = LanguageObjective(LanguageModel(tiny("gpt2"), tokenizer()))
    together = Nearest().fit(objective, Listed(tuple(TEXTS))).scores(TEXTS)
    apart = np.concatenate([Nearest().fit(objective, Listed((t,))).scores(TEXTS) for t in TEXTS], 1)
    assert np.allclose(together, apart, atol=2e-3)
    assert np.allclose(np.diag(together), 1, atol=2e-3)
    assert together[~np.eye(4, dtype=bool)].max() < 0.999


class Convolved(nn.Module):
    """Ends in a convolution whose places are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).relu()).mean((2, 3))  # type: ignore[no-any-return]


def test_places_of_a_convolution_are_averaged() -> None:
    rng = np.random.default_rng(0)
    items = tuple((rng.normal(size=(3, 8, 8)).astype(np.float32), i % 4) for i in range(5))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Convolved()
    with torch.no_grad():
        inside = model.first(torch.tensor(np.stack([x for x, _ in items]))).relu()
    objective = ClassifierObjective(model)
    true = inside.mean((2, 3))
    assert close(Nearest().fit(objective, Listed(items)).scores(items), cosines(true, true), 2e-3)
    with torch.no_grad():
        out = model.first(torch.tensor(np.stack([x for x, _ in items]))).mean((2, 3))
    assert close(Nearest(layer="first").fit(objective, Listed(items)).scores(items), cosines(out, out), 2e-3)


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nodes, self.head = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        from torch_geometric.nn import global_mean_pool

        return self.head(global_mean_pool(self.nodes(x).relu(), batch))  # type: ignore[no-any-return]


def test_nodes_of_a_graph_and_timesteps_of_a_picture_are_averaged() -> None:
    rng = np.random.default_rng(1)
    graphs = [
        (undirected(rng.normal(size=(n, 5)).astype(np.float32), rng.integers(0, n, (2 * n, 2))), 1) for n in (3, 6, 4)
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Pooled()
    with torch.no_grad():
        true = torch.stack([model.nodes(g.x).mean(0) for g, _ in graphs])
    given = Nearest(layer="nodes").fit(GraphObjective(model), Listed(tuple(graphs))).scores(graphs)
    assert close(given, cosines(true, true), 2e-3)

    pictures = [(c, rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for c in ("a red circle", "a blue square")]
    denoiser = DiffusionObjective(StableDiffusion(stable_diffusion()), timesteps=3)
    scores = Nearest().fit(denoiser, Listed(tuple(pictures))).scores(pictures[:1])
    assert scores[0, 0] == pytest.approx(1, abs=2e-3)
    assert scores[0, 1] < 0.999


def test_an_example_that_cannot_be_read_is_named_and_scores_nothing() -> None:
    objective, examples, queries = small()
    broken = Listed((*examples.items[:3], (np.full(5, np.nan, np.float32), 1)), ("a", "b", "c", "d"))
    fitted = Nearest(embed=lambda e: e[0]).fit(objective, broken)
    assert fitted.skipped == (3,)
    assert "d" in fitted.notes[0]
    assert fitted.scores(queries)[0, 3] == 0


def test_no_hook_is_left_and_a_pass_goes_on_where_it_was_stopped() -> None:
    objective, examples, queries = small()
    shelf, stop = Memory(), {"at": 18}

    def embed(example: Any) -> Any:
        stop["at"] -= 1
        if stop["at"] == 0:
            raise KeyboardInterrupt
        return example[0]

    with pytest.raises(KeyboardInterrupt):
        Nearest(embed=embed).fit(objective, examples, shelf)
    assert shelf.done == 16
    given = Nearest(embed=embed).fit(objective, examples, shelf).scores(queries)
    assert np.array_equal(given, Nearest(embed=lambda e: e[0]).fit(objective, examples).scores(queries))
    Nearest().fit(objective, examples)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in objective.module.modules())


def test_a_layer_that_is_not_asked_for_each_example_is_refused() -> None:
    objective = LanguageObjective(LanguageModel(tiny("gpt2"), tokenizer()))
    with pytest.raises(MethodError, match="1 of them for 2 rows"):
        Nearest(layer="transformer.wpe").fit(objective, Listed(("Anna is in it.", "Anna is in it.")))


def test_an_unknown_layer_and_an_empty_set_are_one_clear_error() -> None:
    objective, examples, _ = small()
    with pytest.raises(MethodError, match="no module has this name"):
        Nearest(layer="nothing").fit(objective, examples)
    with pytest.raises(RunError, match="there is none"):
        Nearest().fit(objective, Listed(()))
