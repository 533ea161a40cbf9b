"""Which tokens of which text encoder make up each word of a prompt.

Words are those of `engine/prompts.py`: letters and digits, without the punctuation around them.
``members[word][encoder]`` are positions in that encoder's own token sequence (a CLIP start token is position 0); a word
that lies beyond an encoder's length has no members there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..engine.prompts import split_words, word_spans
from ..errors import PromptError
from ..units import Units


@dataclass(frozen=True)
class Encoder:
    """A text encoder's tokenizer as the attention sees it.

    ``length``: tokens that are kept, special ones included. ``start``: where its tokens begin on the attention's text
    axis. ``ends``: special tokens at the end of every sequence. ``prepare``: what the pipeline does to a prompt first.
    """

    name: str
    tokenizer: Any
    length: int
    start: int = 0
    ends: int = 1
    prepare: Callable[[str], str] = str


def positions(encoder: Encoder, prompt: str) -> list[tuple[int, ...]]:
    """Token positions of each word in this encoder's sequence, those beyond its length included."""
    text = encoder.prepare(prompt)
    words = word_spans(text)
    if len(words) != len(word_spans(prompt)):
        raise PromptError(f"the prompt {prompt!r}", f"{encoder.name} reads it as {text!r}, other words", text)
    if getattr(encoder.tokenizer, "is_fast", False):
        encoded = encoder.tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=False, verbose=False)
        places = encoded["offset_mapping"]
        return [tuple(i for i, (a, b) in enumerate(places) if a < end and b > start) for start, end in words]
    # A tokenizer that gives no places in the text: count the tokens of ever longer beginnings of the prompt.
    empty = len(encoder.tokenizer("").input_ids) - encoder.ends
    count = [len(encoder.tokenizer(text[:end]).input_ids) - encoder.ends for _, end in words]
    first = [len(encoder.tokenizer(text[:start].rstrip()).input_ids) - encoder.ends for start, _ in words]
    return [tuple(range(max(a, empty), b)) for a, b in zip(first, count, strict=True)]


def align(prompt: str, encoders: Sequence[Encoder], vocabulary: frozenset[str] | None = None) -> Units:
    """The prompt's words as Units. Raises PromptError for an empty prompt, unknown words, or words no encoder keeps.

    A word needs a place in one encoder only: one that a short encoder cuts and a longer one keeps is kept, with no
    members in the short one.
    """
    words = split_words(prompt)
    if not words:
        raise PromptError(f"the prompt {prompt!r}", "it has no words", "a few words, such as 'a red circle'")
    if vocabulary is not None:
        unknown = sorted({w for w in words if w.lower() not in vocabulary})
        if unknown:
            known = ", ".join(sorted(vocabulary))
            found = f"the model never saw {', '.join(unknown)}"
            raise PromptError(f"the prompt {prompt!r}", found, f"words of its vocabulary: {known}")
    places_of = [positions(encoder, prompt) for encoder in encoders]
    members = tuple(
        tuple(
            own if own and own[-1] < encoder.length - encoder.ends else ()
            for own, encoder in ((places[i], encoder) for places, encoder in zip(places_of, encoders, strict=True))
        )
        for i in range(len(words))
    )
    if cut := [word for word, places in zip(words, members, strict=True) if not any(places)]:
        lengths = ", ".join(
            f"{encoder.name}: {encoder.length - encoder.ends - (places[0][0] if places and places[0] else 0)}"
            for places, encoder in zip(places_of, encoders, strict=True)
        )
        raise PromptError(
            f"a prompt of {len(words)} words",
            f"the text encoder cuts {', '.join(cut)}",
            f"a shorter prompt (tokens that fit: {lengths})",
        )
    seen: Counter[str] = Counter()
    occurrence = []
    for word in words:
        seen[word] += 1
        occurrence.append(seen[word])
    return Units("word", words, members, tuple(occurrence))


def columns(words: Units, encoders: Sequence[Encoder]) -> tuple[tuple[int, ...], ...]:
    """Each word's places on the attention's text axis: the union over encoders.

    Encoders that share an axis (the two of SDXL) give the same places; those that follow each other (CLIP and T5 in
    SD3) are shifted by their ``start``.
    """
    return tuple(
        tuple(sorted({encoder.start + p for encoder, own in zip(encoders, places, strict=True) for p in own}))
        for places in words.members
    )
