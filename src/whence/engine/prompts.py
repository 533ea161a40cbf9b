"""Words of a prompt as a person counts them, and one of them replaced.

>>> split_words("a red circle, left of a Blue square")
('a', 'red', 'circle', 'left', 'of', 'a', 'Blue', 'square')
>>> replace_word("a red circle, please", 1, "orange")
'an orange circle, please'
>>> drop_word("a red circle", 1)
'a circle'
"""

from __future__ import annotations

import re

_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*", re.UNICODE)


def word_spans(prompt: str) -> tuple[tuple[int, int], ...]:
    """Start and end, in characters, of each word: letters and digits, with inner hyphens and apostrophes."""
    return tuple(m.span() for m in _WORD.finditer(prompt))


def split_words(prompt: str) -> tuple[str, ...]:
    """The words of a prompt, without the punctuation around them."""
    return tuple(prompt[a:b] for a, b in word_spans(prompt))


def _agree(prompt: str, index: int) -> str:
    """Make the article before word ``index`` agree with it: without this, a swap would also plant a mistake."""
    spans = word_spans(prompt)
    if index == 0:
        return prompt
    (a, b), (c, _) = spans[index - 1], spans[index]
    if prompt[a:b] not in ("a", "an"):
        return prompt
    return prompt[:a] + ("an" if prompt[c].lower() in "aeiou" else "a") + prompt[b:]


def replace_word(prompt: str, index: int, alternative: str) -> str:
    """The prompt with word number ``index`` replaced; an article before it is made to agree."""
    a, b = word_spans(prompt)[index]
    return _agree(prompt[:a] + alternative + prompt[b:], index)


def drop_word(prompt: str, index: int) -> str:
    """The prompt without word number ``index``; an article before it is made to agree with what follows."""
    a, b = word_spans(prompt)[index]
    shorter = re.sub(r"\s+", " ", prompt[:a] + prompt[b:]).strip()
    return _agree(shorter, index) if index < len(word_spans(shorter)) else shorter
