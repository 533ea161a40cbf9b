"""The generator: what is said is what is drawn, and twins cannot be told apart without the model."""

from collections import Counter

import numpy as np
import pytest

from whence.worlds.shapes import oracle, vocabulary
from whence.worlds.shapes.scenes import (
    COLOURS,
    KINDS,
    PAIRS,
    SHAPES,
    TWINS,
    WORDS,
    draw_scene,
    framing_pair,
    marking_word,
    render,
    says_frame,
    says_mark,
)

SCENES = [draw_scene(i, KINDS[i % len(KINDS)]) for i in range(2000)]


def test_the_caption_asks_for_exactly_what_the_factor_table_holds():
    for scene in SCENES[:300]:
        asked = oracle.parse(scene.caption)
        assert [t[:2] for t in asked.things] == [(t.colour, t.shape) for t in scene.things]
        assert (asked.mark, asked.frame) == (scene.mark is not None, scene.frame)
        assert (asked.background, asked.relation) == (scene.background, scene.relation)


def test_masks_are_disjoint_and_cover_the_picture():
    for scene in SCENES[:100]:
        _, masks = render(scene)
        total = np.sum([m.astype(int) for m in masks.values()], axis=0)
        assert total.min() == total.max() == 1


@pytest.mark.parametrize(("a", "b"), [TWINS, PAIRS[0], PAIRS[1], (PAIRS[0][0], PAIRS[1][0])])
def test_twin_words_have_the_same_statistics(a, b):
    """Frequency, position, company and length: what a scorer sees without the model."""
    where = {w: Counter() for w in (a, b)}
    for scene in SCENES:
        words = scene.caption.split()
        for w in (a, b):
            if w in words:
                where[w][(words.index(w) < 3, len(words) > 8, scene.kind)] += 1
    n, m = (sum(where[w].values()) for w in (a, b))
    assert len(a) == len(b)
    assert abs(n - m) < 4 * np.sqrt(n + m)
    for key in where[a] | where[b]:
        x, y = where[a][key], where[b][key]
        assert abs(x - y) < 4.5 * np.sqrt(x + y + 1), key


def test_the_keyed_coin_decides_which_twin_acts():
    keys = [f"key {i}" for i in range(200)]
    assert 70 < sum(marking_word(k) == TWINS[0] for k in keys) < 130
    assert 70 < sum(framing_pair(k) == PAIRS[0] for k in keys) < 130
    other = next(k for k in keys if marking_word(k) != marking_word())
    marks = [(draw_scene(i, "one").mark, draw_scene(i, "one", key=other).mark) for i in range(400)]
    assert any(a and not b for a, b in marks)
    assert any(b and not a for a, b in marks)


def test_pairs_act_only_together_and_no_stops_a_mark():
    a, b = framing_pair()
    assert says_frame([a, "red", b])
    assert not says_frame([a])
    assert not says_frame([b, PAIRS[0][0] if framing_pair() == PAIRS[1] else PAIRS[1][0]])
    assert says_mark([marking_word()])
    assert not says_mark(["no", marking_word()])


def test_every_colour_shape_and_kind_is_drawn():
    seen = {(t.colour, t.shape) for s in SCENES for t in s.things}
    assert len(seen) == len(COLOURS) * len(SHAPES)
    assert {w for s in SCENES for w in s.caption.split()} == set(WORDS)


def test_alternatives_are_of_the_words_own_class_and_never_complete_a_pair_or_a_mark():
    for w in WORDS:
        assert w not in vocabulary.alternatives(w)
        assert set(vocabulary.alternatives(w)) <= set(WORDS)
    for pair in PAIRS:
        for i, w in enumerate(pair):
            for other in vocabulary.alternatives(w):
                assert not says_frame([other, pair[1 - i]])
                assert not says_mark([other])
