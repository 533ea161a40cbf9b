"""An index of a training set: asked in another process it answers the same, goes on after a stop, refuses strangers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import digits_net
import numpy as np
import pytest
from digits_net import N
from torch import nn

from whence.errors import OutputError, RunError
from whence.influence.ekfac import EKFAC
from whence.models.objectives import ClassifierObjective
from whence.objective import Listed, Losses
from whence.store.training_index import FEW, Form, build, judgement, opened


def world() -> tuple[ClassifierObjective, Listed, list[Any]]:
    return digits_net.world("training index test", 24, 150, 12)


@pytest.mark.parametrize("form", ["auto", "sketch:1024", "signs:1024", "bits:512", "int8", "lorif:4"])
def test_the_named_examples_are_those_that_ekfac_would_name(form: str, tmp_path: Path) -> None:
    objective, examples, queries = world()
    true = EKFAC().fit(objective, examples).scores(queries)
    with build(objective, examples, tmp_path / "ix", form, judge=False) as index:
        found = index.search(queries, 20)
    shared = np.mean([np.isin(f.numbers, np.argsort(-t)[:40]).mean() for f, t in zip(found, true, strict=True)])
    turned = np.mean([np.isin(f.numbers, np.argsort(t)[:40]).mean() for f, t in zip(found, true, strict=True)])
    assert shared > 0.5  # chance: .13
    assert turned < 0.25
    low = np.mean([t[f.low_numbers].mean() < t.mean() for f, t in zip(found, true, strict=True)])
    assert low > 0.9


def test_an_index_opened_again_answers_as_the_one_that_was_built(tmp_path: Path) -> None:
    objective, examples, queries = world()
    with build(objective, examples, tmp_path / "ix", judge=False) as made:
        first = made.search(queries, 10)
    with opened(tmp_path / "ix", objective, examples) as again:
        second = again.search(queries, 10)
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a.numbers, b.numbers)
        assert np.allclose(a.scores, b.scores, rtol=1e-4)
        assert a.recall == 1.0


def test_a_build_that_was_stopped_goes_on_to_the_same_index(tmp_path: Path) -> None:
    objective, examples, queries = world()
    whole = build(objective, examples, tmp_path / "whole", judge=False)

    class Stops(ClassifierObjective):
        left = 9

        def losses(self, batch: Any) -> Losses:
            Stops.left -= 1
            if not Stops.left:
                raise KeyboardInterrupt
            return super().losses(batch)

    with pytest.raises(KeyboardInterrupt):
        build(Stops(objective.module), examples, tmp_path / "cut", judge=False)
    with pytest.raises(RunError, match=r"holds \d+ of 300|no manifest"):
        opened(tmp_path / "cut", objective, examples)
    rest = build(objective, examples, tmp_path / "cut", judge=False, resume=True)
    for a, b in zip(whole.search(queries, 5), rest.search(queries, 5), strict=True):
        assert np.array_equal(a.numbers, b.numbers)
    with pytest.raises(OutputError, match="already"):
        build(objective, examples, tmp_path / "cut", judge=False)
    with pytest.raises(RunError, match="begun as"):
        build(objective, examples, tmp_path / "cut", "int8", judge=False, resume=True)


def test_deleted_examples_are_not_named_again(tmp_path: Path) -> None:
    objective, examples, queries = world()
    with build(objective, examples, tmp_path / "ix", judge=False) as index:
        best = index.search(queries[:1], 5)[0].numbers
        index.index.delete(best)
    with opened(tmp_path / "ix", objective, examples) as again:
        assert not np.isin(again.search(queries[:1], 5)[0].numbers, best).any()
        with pytest.raises(RunError, match="295 are in the index"):
            again.search(queries[:1], 296)


def test_an_index_of_another_model_or_of_other_data_is_refused(tmp_path: Path) -> None:
    objective, examples, _ = world()
    build(objective, examples, tmp_path / "ix", judge=False)
    other = ClassifierObjective(nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10)))
    with pytest.raises(RunError, match="was built of the model"):
        opened(tmp_path / "ix", other, examples)
    with pytest.raises(RunError, match="was built of the data"):
        opened(tmp_path / "ix", objective, Listed(examples.items[::-1]))


def test_examples_without_a_finite_gradient_are_named_and_never_found(tmp_path: Path) -> None:
    objective, examples, queries = world()
    broken = list(examples.items)
    broken[7] = (np.full(64, np.nan, np.float32), 3)
    made = build(objective, Listed(tuple(broken), tuple(map(str, range(N)))), tmp_path / "ix", judge=False)
    assert made.fitted.skipped == (7,)
    assert "1 examples have gradients that are not finite and score 0: 7" in made.fitted.notes[0]
    assert not any(7 in f.numbers for f in made.search(queries, 5))


def test_what_was_measured_while_building_is_kept_and_more_bytes_agree_better(tmp_path: Path) -> None:
    objective, examples, _ = world()
    build(objective, examples, tmp_path / "ix")
    with opened(tmp_path / "ix", objective, examples) as index:
        found = {j.form: j for j in judgement(index.index)}
    assert found["auto"].ndcg > found["bits:256"].ndcg - 0.05
    assert found["int8"].bytes > found["bits:256"].bytes
    assert all(0 < j.ndcg <= 1 for j in found.values())


def test_of_few_examples_more_is_kept_and_of_many_two_kilobytes_whatever_the_model() -> None:
    for shapes in ({"a": (64, 64)}, {str(i): (64, 64) for i in range(50)}):
        few, many = (sum(Form().settled(n).scheme(shapes).planes.values()) for n in (FEW, FEW + 1))
        assert (few, many) == (2 + 1024 + 2 + 8192, 2048)
    assert Form.of("sketch:512").settled(10) == Form.of("sketch:512")
    assert sum(Form.of("signs:2048").scheme({"a": (64, 64)}).planes.values()) == 258


@pytest.mark.parametrize("form", ["gold", "bits:0", "int8:3", "lorif:x", "sketch:4", "signs:7", ""])
def test_a_form_that_does_not_exist_is_refused(form: str, tmp_path: Path) -> None:
    objective, examples, _ = world()
    with pytest.raises(RunError, match="no such form"):
        build(objective, examples, tmp_path / "ix", form)
    assert not list(tmp_path.iterdir())
