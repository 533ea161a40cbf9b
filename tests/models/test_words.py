"""Which tokens make up a word: told by decoding them again."""

from __future__ import annotations

import pytest
from specimens import FAMILIES, PROMPT, fresh, model

from whence.engine.prompts import split_words
from whence.errors import PromptError
from whence.models.pictures import Lexicon
from whence.models.words import Encoder, align, columns, positions


def ids(encoder: Encoder, prompt: str) -> list[int]:
    return list(encoder.tokenizer(encoder.prepare(prompt)).input_ids)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", [PROMPT, "  a zebra's tail -- and (two) words!  ", "dog,cat a.b", "a red red red"])
def test_the_tokens_of_a_word_decode_to_the_word(family: str, prompt: str) -> None:
    adapter = model(family)
    words = adapter.words(prompt)
    assert split_words(prompt) == words.names
    for e, encoder in enumerate(adapter.encoders()):
        tokens = ids(encoder, prompt)
        known = set("abcdefghijklmnopqrstuvwxyz")
        for name, members in zip(words.names, words.members, strict=True):
            text = encoder.tokenizer.decode([tokens[p] for p in members[e]]).replace(" ", "")
            letters = "".join(c for c in name.lower() if c in known)
            assert "".join(c for c in text.lower() if c in known).startswith(letters[:1])
            if name.isalpha() and name.islower():
                assert text == name


@pytest.mark.parametrize("family", FAMILIES)
def test_words_share_no_token_and_take_no_special_one(family: str) -> None:
    adapter = model(family)
    words = adapter.words(PROMPT)
    for e, encoder in enumerate(adapter.encoders()):
        taken = [p for members in words.members for p in members[e]]
        assert len(taken) == len(set(taken))
        last = len(ids(encoder, PROMPT)) - 1
        assert last not in taken
        assert not (encoder.name.startswith("CLIP") and 0 in taken)


def test_punctuation_is_no_word_and_repeats_are_counted() -> None:
    words = model("sd").words("a red , red; (red) cat .")
    assert list(words.labels) == ["a", "red", "red#2", "red#3", "cat"]


def test_two_encoders_share_columns_in_sdxl_and_follow_each_other_in_sd3() -> None:
    adapter = model("sdxl")
    words = adapter.words("a red fox")
    assert words.members == (((1,), (1,)), ((2,), (2,)), ((3,), (3,)))
    assert adapter.columns(words) == ((1,), (2,), (3,))
    adapter = model("sd3")
    words = adapter.words("a red fox")
    assert words.members[2] == ((3,), (3,), (2,))
    assert adapter.columns(words) == ((1, 77), (2, 78), (3, 79))


@pytest.mark.parametrize("family", ["sd", "sdxl", "pixart", "flux"])
def test_a_prompt_that_the_encoder_cuts_is_refused_with_the_words_cut(family: str) -> None:
    with pytest.raises(PromptError, match=r"cuts .*fox"):
        model(family).words("red " * 75 + "fox")
    room = {"pixart": 47, "flux": 47}.get(family, 75)
    words = model(family).words(" ".join(["red"] * room))
    assert len(words) == room
    with pytest.raises(PromptError):
        model(family).words(" ".join(["red"] * (room + 1)))


def test_a_word_cut_by_clip_is_kept_where_t5_has_it() -> None:
    adapter = fresh("sd3")
    adapter.pipeline.tokenizer_3.model_max_length = 120
    words = adapter.words("red " * 80 + "fox")
    assert words.members[-1] == ((), (), (80,))
    assert words.members[0] == ((1,), (1,), (0,))
    assert adapter.columns(words)[-1] == (157,)
    run = adapter.picture("red " * 80 + "fox", steps=1)
    assert len(run.words) == 81
    adapter.pipeline.text_encoder_3 = None  # then T5's columns are zeros and the word is lost
    with pytest.raises(PromptError, match="fox"):
        adapter.words("red " * 80 + "fox")


@pytest.mark.parametrize("prompt", ["", "   ", ", . !"])
def test_a_prompt_without_words_is_refused(prompt: str) -> None:
    with pytest.raises(PromptError, match="no words"):
        model("sd").words(prompt)


def test_a_word_that_the_model_never_saw_is_refused_with_the_vocabulary() -> None:
    adapter = fresh("sd")
    adapter.lexicon = Lexicon(frozenset({"a", "red", "fox", "blue"}), {"red": ("red", "blue")})
    assert adapter.words("A red fox.").names == ("A", "red", "fox")
    with pytest.raises(PromptError, match=r"never saw dragon, green(.|\n)*a, blue, fox, red"):
        adapter.words("a green dragon")
    assert adapter.alternatives("a Red fox", 1) == ("blue",)
    assert adapter.alternatives("a red fox", 2) == ()
    assert model("sd").alternatives("a red fox", 1) == ()


def test_a_tokenizer_without_places_in_the_text_gives_the_same_positions() -> None:
    class Plain:
        """A tokenizer as a slow one is: no offsets."""

        def __init__(self, tokenizer: object) -> None:
            self.own = tokenizer
            self.is_fast = False

        def __call__(self, text: str) -> object:
            return self.own(text)  # type: ignore[operator]

    for family in ("sd", "pixart"):
        encoder = model(family).encoders()[0]
        slow = Encoder(encoder.name, Plain(encoder.tokenizer), encoder.length, prepare=encoder.prepare)
        prompt = "a red circle and the white dog"
        assert positions(slow, prompt) == positions(encoder, prompt)
        assert columns(align(prompt, [slow]), [slow]) == columns(align(prompt, [encoder]), [encoder])
