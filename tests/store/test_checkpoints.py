"""Several checkpoints asked as one: the mean of what each says, of all that any of them found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import digits_net
import numpy as np
import pytest
from digits_net import N

from whence.cli import commands, run
from whence.errors import RunError
from whence.influence.ekfac import EKFAC
from whence.models.objectives import ClassifierObjective
from whence.objective import Listed
from whence.store.checkpoints import Checkpoints, places
from whence.store.training_index import TrainingIndex, build
from whence.worlds.facts import twin_directory


def world(steps: int) -> tuple[ClassifierObjective, Listed, list[Any]]:
    return digits_net.world("checkpoints test", 16, steps, 4)


def built(folder: Path, steps: tuple[int, ...], form: str = "int8", judge: bool = False) -> list[TrainingIndex]:
    where = places(str(folder), len(steps))
    return [build(*world(s)[:2], p, form, judge=judge) for s, p in zip(steps, where, strict=True)]


def ranked(found: Any) -> np.ndarray:
    return found.scores[np.argsort(found.numbers)]


@pytest.mark.parametrize("form", ["auto", "int8"])
def test_the_score_is_the_mean_of_what_each_checkpoint_says(form: str, tmp_path: Path) -> None:
    members = built(tmp_path / "ix", (40, 200), form)
    queries = world(40)[2]
    with Checkpoints(tuple(members)) as both:
        found = both.search(queries, N)
    own = [m.fitted.scores(queries) for m in members]
    for q, f in enumerate(found):
        assert f.again == N
        np.testing.assert_allclose(
            ranked(f), np.mean([o[q] for o in own], 0), rtol=1e-3, atol=1e-4 * np.abs(own[0]).max()
        )
    assert np.corrcoef(own[0][0], own[1][0])[0, 1] < 0.98  # the two do not say the same


def test_one_checkpoint_twice_says_what_it_says_alone(tmp_path: Path) -> None:
    members = built(tmp_path / "ix", (40, 40), "auto")
    queries = world(40)[2]
    alone, twice = members[0].search(queries, 15), Checkpoints(tuple(members)).search(queries, 15)
    for a, b in zip(alone, twice, strict=True):
        assert np.array_equal(a.numbers, b.numbers)
        assert np.array_equal(a.low_numbers, b.low_numbers)
        np.testing.assert_allclose(a.scores, b.scores, rtol=1e-3)


def test_the_last_stage_is_the_mean_of_each_checkpoints_ekfac(tmp_path: Path) -> None:
    members = built(tmp_path / "ix", (40, 200), judge=True)
    queries = world(40)[2][:2]
    found = Checkpoints(tuple(members)).search(queries, N, N)
    true = np.mean([EKFAC().fit(*world(s)[:2]).scores(queries) for s in (40, 200)], 0)
    for q, f in enumerate(found):
        assert f.exact == N
        assert np.corrcoef(ranked(f), true[q])[0, 1] > 0.95  # each fitted on a sample of its own
    few = Checkpoints(tuple(members)).search(queries, 5, None)[0]
    assert few.exact >= 10


def test_what_was_deleted_from_one_is_named_by_none(tmp_path: Path) -> None:
    members = built(tmp_path / "ix", (40, 200))
    queries = world(40)[2]
    best = int(Checkpoints(tuple(members)).search(queries, 1)[0].numbers[0])
    members[1].index.delete([best])
    found = Checkpoints(tuple(members)).search(queries, 20)[0]
    assert best not in found.numbers
    with pytest.raises(RunError, match="299 are in the index"):
        Checkpoints(tuple(members)).search(queries, N)


def test_indexes_of_other_examples_or_forms_are_refused(tmp_path: Path) -> None:
    (one,) = built(tmp_path / "ix", (40,))
    other = build(*world(200)[:2], tmp_path / "other", "bits", judge=False)
    with pytest.raises(RunError, match="the same format"):
        Checkpoints((one, other))


def test_the_command_asks_all_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        f"{name} was born in {town}. {name} likes the park." for name in ("Anna", "Ben") for town in ("Istra", "Gondel")
    ]
    (tmp_path / "lives.txt").write_text("\n\n".join(rows * 3))
    place = str(tmp_path / "ix")
    asked = [
        "index",
        "facts",
        str(tmp_path / "lives.txt"),
        "-o",
        place,
        "--checkpoint",
        str(twin_directory()),
        "--json",
    ]
    assert run(commands.app, asked) == 0
    capsys.readouterr()
    assert (tmp_path / "ix" / "checkpoint-2").is_dir()
    assert run(commands.app, ["query", place, "--prompt", "Question: Where was Anna born?\nAnswer:", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["checkpoints"] == 2
    assert len(record["top"]) == 10
    assert run(commands.app, [*asked[:-3], "--checkpoint", "nowhere", "-o", str(tmp_path / "no")]) == 2
    assert not (tmp_path / "no").exists()
