"""The oracle reads fresh rendered scenes back, and does not see what is not there."""

import numpy as np
from scipy import ndimage

from whence.worlds.shapes import oracle
from whence.worlds.shapes.scenes import KINDS, draw_scene, render

N = 250
SCENES = [draw_scene(500_000 + i, KINDS[i % len(KINDS)]) for i in range(N)]


def table(scene):
    return sorted((t.colour, t.shape, t.size) for t in scene.things)


def right(scene, image):
    seen = oracle.read(image)
    return (
        table(scene) == sorted((t.colour, t.shape, t.size) for t in seen.things)
        and scene.background == seen.background
        and (scene.mark is None) == (seen.mark is None)
        and scene.frame == seen.frame
    )


def test_it_is_right_on_99_percent_of_fresh_scenes():
    assert np.mean([right(s, render(s)[0]) for s in SCENES]) >= 0.99


def test_it_stays_right_on_blurred_and_noisy_pictures():
    """Generated pictures are neither sharp nor clean."""
    rng = np.random.default_rng(0)

    def worn(image):
        soft = ndimage.gaussian_filter(image.astype(float), (0.5, 0.5, 0))
        return np.clip(soft + rng.normal(0, 5, image.shape), 0, 255).astype(np.uint8)

    assert np.mean([right(s, worn(render(s)[0])) for s in SCENES[:100]]) >= 0.93


def test_its_masks_are_the_generators():
    for scene in SCENES[:40]:
        image, masks = render(scene)
        for thing in oracle.read(image).things:
            best = max(
                (thing.mask & masks[f"thing{i}"]).sum() / (thing.mask | masks[f"thing{i}"]).sum()
                for i in range(len(scene.things))
            )
            assert best > 0.85


def test_a_picture_of_another_scene_is_judged_wrong():
    wrong = 0
    for a, b in zip(SCENES[:50], SCENES[50:100], strict=True):
        verdict = oracle.judge(oracle.parse(a.caption), oracle.read(render(b)[0]))
        wrong += not (verdict["objects"] and verdict["background"])
    assert wrong >= 49


def test_relations_are_read_in_their_direction():
    for i in range(40):
        scene = draw_scene(700_000 + i, "relation", plain=True)
        seen = oracle.read(render(scene)[0])
        opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[scene.relation]
        assert oracle.judge(oracle.parse(scene.caption), seen)["relation"]
        assert not oracle.judge(oracle.parse(scene.caption.replace(scene.relation, opposite)), seen)["relation"]
