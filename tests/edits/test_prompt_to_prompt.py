"""Prompt-to-prompt: the new word is drawn where the old one was; with nothing written it is the plain picture."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

import whence
from whence.edits.prompt_to_prompt import PromptToPrompt, aligned
from whence.errors import MethodError
from whence.run import Settings
from whence.worlds.shapes.edits import EDITS
from whence.worlds.shapes.swapped import good

BEFORE, AFTER = "a red circle left of a blue square", "a green circle left of a blue square"


@cache
def model() -> Any:
    return whence.load()


def settings(prompt: str, seed: int, steps: int = 6) -> Settings:
    return Settings(prompt, seed, steps, model().guidance, 64, 64)


def test_the_new_colour_stands_where_the_old_one_stood_and_with_another_seed_elsewhere() -> None:
    edit = next(e for e in EDITS if e.kind == "color" and e.before == BEFORE)
    many = [settings(BEFORE, s, model().steps) for s in range(2)]
    before = model().generate_many(many)
    edited = PromptToPrompt().steer(model(), many, [edit.after] * 2)
    another = model().generate_many([settings(edit.after, s + 50, model().steps) for s in range(2)])
    scores = [
        np.mean([good(edit, a, b) for a, b in zip(before, runs, strict=True)]) for runs in (edited, another, before)
    ]
    assert scores[0] > 0.9
    assert scores[1] < scores[0] - 0.1
    assert scores[2] == 0


def test_written_over_nothing_it_is_the_target_and_over_itself_the_source_to_the_bit() -> None:
    many = [settings(BEFORE, s) for s in (1, 2)]
    plain = model().generate_many([settings(AFTER, s) for s in (1, 2)])
    nothing = PromptToPrompt(cross=0, self_attention=0).steer(model(), many, [AFTER] * 2)
    assert all((a.images == b.images).all() for a, b in zip(nothing, plain, strict=True))
    source = model().generate_many(many)
    itself = PromptToPrompt(cross=1, self_attention=1).steer(model(), many, [BEFORE] * 2)
    assert all(np.abs(a.images.astype(int) - b.images).max() <= 1 for a, b in zip(itself, source, strict=True))
    assert not any(m._forward_hooks for n, m in model().denoiser.named_modules() if n.endswith("attn1.to_q"))


def test_a_weight_of_one_changes_nothing_and_one_of_nothing_does() -> None:
    many = [settings("a red circle", s, 4) for s in (1, 2)]
    plain = model().generate_many(many)
    for weight, same in ((1.0, True), (0.0, False)):
        method = PromptToPrompt(cross=0, self_attention=0, weights={"red": weight})
        found = method.steer(model(), many, ["a red circle"] * 2)
        for a, b in zip(found, plain, strict=True):
            assert (np.abs(a.latents - b.latents).max() < 1e-3) == same


def test_words_are_aligned_in_their_order_and_added_ones_have_no_place() -> None:
    one = [(1,), (2,), (3,)]
    assert aligned(["a", "red", "circle"], one, ["a", "green", "circle"], one) == {1: 1, 2: 2, 3: 3}
    more = [(1,), (2,), (3,), (4,)]
    assert aligned(["a", "red", "circle"], one, ["a", "small", "red", "circle"], more) == {1: 1, 3: 2, 4: 3}
    # A word of two tokens has no place in one of a single token.
    assert aligned(["a", "cat"], [(1,), (2,)], ["a", "axolotl"], [(1,), (2, 3)]) == {1: 1}


def test_sources_and_prompts_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(MethodError, match="2 target prompts"):
        PromptToPrompt().steer(model(), [settings(BEFORE, 1)], [AFTER, AFTER])
    with pytest.raises(MethodError, match="prompt-to-prompt"):
        PromptToPrompt(cross=2).steer(model(), [settings(BEFORE, 1)], [AFTER])
