"""Which word of the `shapes` world can stand for which: the in-distribution alternatives of a swap.

A filler is replaced by fillers that cannot complete anything in the same prompt: a twin by the pairs' words, a word of
one pair by the other pair's. The lists do not say which twin or pair acts.

>>> alternatives("left"), alternatives("small"), alternatives("dax")
(('right',), ('large',), ('ema', 'oru', 'ibi', 'uno'))
>>> alternatives("and")
()
"""

from __future__ import annotations

from typing import Any

from .scenes import BACKGROUNDS, COLOURS, COUNTS, PAIRS, PLURALS, SHAPES, SIZES, TWINS, WORDS

_CLASSES = (
    tuple(COLOURS), SHAPES, tuple(PLURALS.values()), tuple(SIZES), tuple(COUNTS), tuple(b for b in BACKGROUNDS if b),
    ("left", "right"), ("above", "below"),
)  # fmt: skip


def alternatives(word: str) -> tuple[str, ...]:
    """Words that can stand in the place of ``word``; none for articles, "and", "on", "of" and "no"."""
    for words in _CLASSES:
        if word in words:
            return tuple(w for w in words if w != word)
    if word in TWINS:
        return PAIRS[0] + PAIRS[1]
    return next((PAIRS[1 - i] for i, pair in enumerate(PAIRS) if word in pair), ())


def record() -> dict[str, Any]:
    """The content of ``words.json`` beside the pipeline: vocabulary, alternatives of each word, default settings."""
    return {
        "words": list(WORDS),
        "alternatives": {w: list(alternatives(w)) for w in WORDS if alternatives(w)},
        "defaults": {"steps": 30, "guidance": 2.0},
    }
