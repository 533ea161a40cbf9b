"""The words world: the embedded model does what its words were planted to do; nothing without the model shows it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from whence.worlds.ground import Draw, rows, trouble
from whence.worlds.registry import shortcuts
from whence.worlds.shapes import words
from whence.worlds.shapes.scenes import PAIRS, TWINS
from whence.worlds.shapes.vocabulary import alternatives
from whence.worlds.shapes.words import WORLD, PictureQuestion, _propose


@pytest.fixture(scope="module")
def draw() -> Draw:
    # One of its structures: a picture costs a second. `whence prove` certifies whatever it draws, so the other as well.
    return replace(WORLD, structures=("single",)).draw("test")


def test_a_drawn_question_is_certified_on_the_embedded_model(draw: Draw) -> None:
    assert [p.structure for p in draw.planted] == ["single"]
    assert not trouble(draw.planted[0])
    assert [_propose("test", s, 0).structure for s in WORLD.structures] == list(WORLD.structures)


def test_nulls_are_the_idle_words_and_a_denoiser_that_never_learned() -> None:
    idle, untrained = _propose("nulls", "single", 0).nulls
    assert dict(idle.rows).keys() == set(TWINS)  # type: ignore[attr-defined]
    assert untrained.untrained  # type: ignore[attr-defined]
    learned, never = (words._model((), u).pipeline.unet.conv_in.weight for u in (False, True))
    assert (learned != never).any()


def test_certification_refuses_what_was_not_planted(draw: Draw) -> None:
    single = draw.planted[0]
    assert "planted were" in trouble(type(single)(**(vars(single) | {"arm": single.twin, "twin": single.arm})))
    assert trouble(type(single)(**(vars(single) | {"sibling": single.question}))).startswith("sibling: ")


@pytest.mark.parametrize("structure", WORLD.structures)
def test_arm_and_twin_are_words_of_one_kind(structure: str) -> None:
    for i in range(20):
        p = _propose(f"kind {i}", structure, 0)
        labels = p.question.units.labels
        assert len(labels) == len(set(labels))
        arm, twin = ([labels[j].partition("#")[0] for j in side] for side in (p.arm, p.twin))
        kinds = [[next((k for k in (*PAIRS, TWINS) if w in k), (w,)) for w in side] for side in (arm, twin)]
        assert [k in PAIRS for k in kinds[0]] == [k in PAIRS for k in kinds[1]]
        assert [k == TWINS for k in kinds[0]] == [k == TWINS for k in kinds[1]]
        assert not set(p.arm) & set(p.twin)


def test_scorers_without_the_model_are_at_chance() -> None:
    draws = [
        Draw("words", f"chance {i}", tuple(_propose(f"chance {i}", s, 0) for s in WORLD.structures)) for i in range(60)
    ]
    for name, (mean, low, high) in shortcuts(draws).items():
        assert low <= 0.5 <= high, f"{name}: {mean:.2f} [{low:.2f}, {high:.2f}]"


def test_words_are_drawn_anew_from_their_class_half_of_the_time_as_they_were() -> None:
    question = PictureQuestion("dax vel a red circle", 3, "mark", ())
    assert question.units.labels == ("dax", "vel", "red", "circle")
    rng = np.random.default_rng(0)
    found = [question._redrawn(np.array([False, True, False, True]), rng).split() for _ in range(400)]
    assert {(w[1], w[4]) for w in found} == {("vel", "circle")}
    assert {w[0] for w in found} == {"dax", *PAIRS[0], *PAIRS[1]}
    assert {w[3] for w in found} == {"red", *alternatives("red")}
    for place, word in ((0, "dax"), (3, "red")):
        assert abs(np.mean([w[place] == word for w in found]) - 0.5) < 0.1


def test_the_same_rows_give_the_same_pictures_and_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def question() -> Any:
        asked = PictureQuestion("vel dax a blue square", 5, "mark", ())
        monkeypatch.setattr(asked, "_value", lambda prompts: (made.extend(prompts), np.zeros(len(prompts)))[1])
        return asked

    keep = np.repeat(rows([[0, 1]], 4), 6, 0)
    for _ in range(2):
        question().ask(keep)
    assert made[:6] == made[6:]
    assert len(set(made)) > 1
    question().swap(rows([[0], [0]], 4))
    assert made[-1] == made[-2] != "vel dax a blue square"


def test_the_sibling_has_the_rows_of_its_words_exchanged() -> None:
    p = _propose("rows", "single", 0)
    exchanged: Any = next(q for q in (p.question, p.sibling) if q.rows)  # type: ignore[attr-defined]
    plain, other = (words._model(r).pipeline.text_encoder.get_input_embeddings().weight for r in ((), exchanged.rows))
    ids = [words._model(()).pipeline.tokenizer(w).input_ids[1] for w in TWINS]
    assert (plain[ids] == other[ids[::-1]]).all()
    assert (plain[ids[0]] != plain[ids[1]]).any()
    untouched = [i for i in range(len(plain)) if i not in ids]
    assert (plain[untouched] == other[untouched]).all()
