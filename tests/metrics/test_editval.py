"""EditVal: the judge tells made from unmade and careful from careless, which the pixels' distance cannot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from whence.errors import ModelError, RunError
from whence.metrics.editval import RULES, TYPES, by_detector, editval
from whence.worlds.shapes.edits import EDITS, Edit, Judged, judged, right_before
from whence.worlds.shapes.judging import cases, measure


def test_the_exact_judge_tells_what_was_drawn_and_the_distance_and_dice_do_not() -> None:
    found = measure(editval, 4)
    assert np.mean(found.values) >= 0.95
    assert max(np.mean(v) for v in found.controls.values()) < 0.8


def test_success_and_preservation_are_apart() -> None:
    made, undone, careless, slip = cases(4)[:4]
    rows = [editval([c.edit], [c.before], [c.after])[c.edit.kind] for c in (made, undone, careless, slip)]
    assert [r.success.mean for r in rows] == [1, 0, 1, 0]
    assert rows[0].preserved is not None
    assert [r.preserved.mean == 1 for r in rows if r.preserved] == [True, True, False, False]
    assert rows[0].moved == pytest.approx(0, abs=0.5)


def test_every_type_has_edits_here_or_says_why_not() -> None:
    assert len(TYPES) == 13
    assert {e.kind for e in EDITS} == {k for k, why in TYPES.items() if not why}


def test_a_first_picture_that_is_wrong_has_nothing_to_edit() -> None:
    case = cases(1)[0]
    assert right_before(case.edit, case.before)
    assert not right_before(case.edit, np.full((64, 64, 3), 236, np.uint8))
    blank = np.full((64, 64, 3), 236, np.uint8)
    found = editval([case.edit] * 2, [case.before, blank], [case.after, blank], there=[True, False])
    assert found[case.edit.kind].skipped == 1
    with pytest.raises(RunError, match="no first picture"):
        editval([case.edit], [blank], [blank], there=[False])


def test_unknown_types_and_lists_that_do_not_belong_together_are_refused() -> None:
    case = cases(1)[0]
    with pytest.raises(RunError, match="types mood"):
        editval([Edit("mood", "a", "b")], [case.before], [case.after])
    with pytest.raises(RunError, match="1 edits, 2 and 1"):
        editval([case.edit], [case.before] * 2, [case.after])


class Wired:
    """Finds what is written into the first pixel's neighbours: a name for each box."""

    def __init__(self, boxes: dict[int, list[tuple[str, tuple[float, float, float, float]]]]) -> None:
        self.boxes = boxes

    def detect(self, image: Any, names: Sequence[str]) -> list[tuple[str, float, tuple[float, float, float, float]]]:
        return [(n, 0.5, box) for n, box in self.boxes[int(image[0, 0, 0])] if n in names]


LEFT, RIGHT, BIG = (0.0, 0.0, 10.0, 10.0), (50.0, 0.0, 60.0, 10.0), (0.0, 0.0, 20.0, 20.0)


@pytest.mark.parametrize(
    ("edit", "first", "second", "success"),
    [
        (Edit("object_addition", "", "", "", "cat"), [], [("cat", LEFT)], True),
        (Edit("object_addition", "", "", "", "cat"), [], [], False),
        (Edit("object_replacement", "", "", "dog", "cat"), [("dog", LEFT)], [("cat", LEFT)], True),
        (Edit("object_replacement", "", "", "dog", "cat"), [("dog", LEFT)], [("cat", LEFT), ("dog", RIGHT)], False),
        (Edit("positional_addition", "", "", "dog", "cat", "left of"), [], [("dog", RIGHT), ("cat", LEFT)], True),
        (Edit("positional_addition", "", "", "dog", "cat", "right of"), [], [("dog", RIGHT), ("cat", LEFT)], False),
        (Edit("position_replacement", "", "", "dog", "", "left of"), [], [("dog", LEFT)], True),
        (Edit("size", "", "", "dog", "large"), [("dog", LEFT)], [("dog", BIG)], True),
        (Edit("size", "", "", "dog", "small"), [("dog", LEFT)], [("dog", BIG)], False),
        (Edit("alter_parts", "", "", "dog", "hat"), [], [("hat", LEFT)], True),
    ],
)
def test_a_detectors_boxes_are_held_against_the_rules(edit: Edit, first: Any, second: Any, success: bool) -> None:
    before, after = np.zeros((64, 64, 3), np.uint8), np.ones((64, 64, 3), np.uint8)
    judge = by_detector(Wired({0: first, 1: second}))
    assert judge(edit, before, after) == Judged(success, None)
    assert edit.kind in RULES
    assert editval([edit], [before], [after], judge)[edit.kind].preserved is None


def test_a_type_without_a_published_rule_and_a_word_that_is_no_relation_are_refused() -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(RunError, match="no rule is published"):
        by_detector(Wired({0: []}))(Edit("style", "", "", "dog", "cat"), picture, picture)
    with pytest.raises(RunError, match="no rule for it"):
        by_detector(Wired({0: [("dog", LEFT), ("cat", LEFT)]}))(
            Edit("positional_addition", "", "", "dog", "cat", "behind"), picture, picture
        )


def test_owl_vit_from_a_folder_finds_boxes_inside_the_picture(tmp_path: Path) -> None:
    from detectors import tiny_owl

    from whence.models.detectors import OwlViT

    with pytest.raises(ModelError, match="the detector"):
        OwlViT(tmp_path / "nothing")
    picture = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    found = OwlViT(tiny_owl(tmp_path / "owl")).detect(picture, ["cat", "dog"])
    assert {name for name, *_ in found} <= {"cat", "dog"}
    scores = [score for _, score, _ in found]
    assert scores == sorted(scores, reverse=True)
    assert len(found) == 9


def test_judging_twice_is_judging_once() -> None:
    case = cases(2)[0]
    assert judged(case.edit, case.before, case.after) == judged(case.edit, case.before, case.after)
