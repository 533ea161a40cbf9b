"""The oracle as a judge of seeds, prompts of one kind, captions of what is there."""

from __future__ import annotations

import numpy as np
import pytest

from whence.worlds.shapes.chance import judge, rectified, siblings
from whence.worlds.shapes.oracle import parse
from whence.worlds.shapes.scenes import KINDS, draw_scene, render


@pytest.mark.parametrize("kind", KINDS)
def test_a_drawn_scene_is_right_and_its_caption_is_found_again(kind: str) -> None:
    right, same = [], []
    for i in range(12):
        scene = draw_scene(i, kind, plain=True)
        image = render(scene)[0]
        said = judge(scene.caption, image)
        right.append(said["success"])
        found = parse(rectified(scene.caption, image))
        asked = parse(scene.caption)
        told = sorted((c, s) for c, s, _ in found.things) == sorted((c, s) for c, s, _ in asked.things)
        same.append(told and (not asked.relation or judge(rectified(scene.caption, image), image)["success"]))
    assert np.mean(right) > 0.9
    assert np.mean(same) > 0.9


def test_another_scene_is_wrong_and_gets_its_own_caption() -> None:
    image = render(draw_scene(3, "count", plain=True))[0]
    assert not judge("a red circle left of a blue square", image)["success"]
    for kind in ("count", "relation"):
        scenes = [draw_scene(i, kind, plain=True) for i in range(8)]
        told = [rectified(scenes[0].caption, render(s)[0]) for s in scenes]
        assert all(judge(t, render(s)[0])["success"] for t, s in zip(told, scenes, strict=True) if t)


def test_numbers_of_a_picture_lie_where_they_should() -> None:
    scene = draw_scene(5, "one", plain=True)
    said = judge(scene.caption, render(scene)[0])
    assert 0 < said["y"] < 1
    assert said["number"] == 1
    assert np.hypot(*said["hue"]) == pytest.approx(1)
    y, x = np.unravel_index(int(np.argmax(said["layout"])), (4, 4))
    assert abs((y + 0.5) / 4 - said["y"]) < 0.26
    assert abs((x + 0.5) / 4 - said["x"]) < 0.26


def test_siblings_keep_the_kind_and_differ() -> None:
    for prompt in ("two green circles", "an orange cross above a red circle", "a red circle and a blue square"):
        found = siblings(prompt, 12)
        assert len(set(found)) == 12
        assert prompt not in found
        assert siblings(prompt, 12) == found
        for other in found:
            judge.check(other)
            assert parse(other).kind == parse(prompt).kind
            assert parse(other).relation == parse(prompt).relation
            assert len({c for c, _, _ in parse(other).things}) == len({c for c, _, _ in parse(prompt).things})
            assert (" an " in f" {other}") == any(f" an {v}" in f" {other}" for v in "aeiou")
