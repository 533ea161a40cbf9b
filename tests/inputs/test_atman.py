"""AtMan: on transformers whose weights are set by hand, the word that is read is found, and words that say the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sentences import tiny, tokenizer
from wired_llama import CODES, WORDS, code, reader

from whence.errors import MethodError
from whence.inputs.atman import AtMan
from whence.models.text import LanguageModel
from whence.models.text_question import PromptQuestion
from whence.question import Budget, Metered
from whence.segments import split
from whence.text import TextSettings
from whence.units import Units


def asked(prompt: str, level: str = "word", **choices: Any) -> PromptQuestion:
    run = reader().write(TextSettings(f"{prompt} ?", forced="yes"))
    tree = split(run.prompt, fixed=[(len(prompt), len(run.prompt))])
    return reader().question(run, tree, level=level, **choices)


def tiny_question(kind: str, **choices: Any) -> PromptQuestion:
    prompt = "Anna is in the kitchen. Ben has the key. Clara took the lamp.\nQuestion: Where is Anna?\nAnswer:"
    adapter = LanguageModel(tiny(kind), tokenizer(), kind)
    run = adapter.write(TextSettings(prompt, forced=" in the kitchen"))
    return adapter.question(run, split(prompt, fixed=[(prompt.index("Question"), len(prompt))]), **choices)


FILLER = ("a", "lamp", "is", "near", "one", "old", "door")


def shuffled_prompts() -> list[tuple[str, int]]:
    found = []
    for seed in range(8):
        words = [*FILLER, "red"]
        np.random.default_rng(seed).shuffle(words)
        found.append((" ".join(words), words.index("red")))
    return found


@pytest.mark.parametrize("how", ["multiply", "bias"])
def test_the_word_that_is_read_scores_highest_and_scores_dealt_out_do_not_find_it(how: str) -> None:
    right = dealt = 0
    for seed, (prompt, cause) in enumerate(shuffled_prompts()):
        scores = AtMan(how=how).explain(asked(prompt)).scores
        right += int(scores.argmax()) == cause and scores[cause] > 5 * abs(np.delete(scores, cause)).max()
        dealt += int(np.random.default_rng(seed).permutation(scores).argmax()) == cause
    assert right == 8
    assert dealt <= 4


def test_a_word_that_speaks_against_the_answer_scores_below_0() -> None:
    question = asked("a red lamp is near one door")
    no = question.run.again(forced="no")
    against = reader().question(no, question.segments, level="word")
    scores = AtMan().explain(against).scores
    assert scores.argmin() == 1
    assert scores[1] < -0.5


@pytest.mark.parametrize("twice", ["red lamp is near one red door", "red lamp is near one scarlet door"])
def test_words_that_say_the_same_hide_each_other_and_grouping_brings_them_back(twice: str) -> None:
    once = AtMan().explain(asked("red lamp is near one old door")).scores
    apart = AtMan(kappa=None).explain(asked(twice)).scores
    grouped = AtMan().explain(asked(twice))
    same = [0, 5]
    assert once[0] > 0.5
    assert apart[same].max() < 0.15 * once[0]  # either can be turned down without much loss
    assert grouped.scores[same].min() > 0.25 * once[0]
    assert grouped.scores[same].min() > 3 * apart[same].max()
    assert set(np.argsort(-grouped.scores)[:2]) == set(same)
    assert abs(np.delete(grouped.scores, same)).max() < 0.2 * grouped.scores[same].min()
    labels = grouped.units.labels
    assert {k: [label for label, _ in v] for k, v in grouped.details["together"].items()} == {
        labels[0]: [labels[5]], labels[5]: [labels[0]]
    }  # fmt: skip
    assert "2 of 7 units" in str(grouped)


def test_what_is_less_alike_than_kappa_does_not_go_together() -> None:
    question = asked("red lamp is near one scarlet door")
    strict = AtMan(kappa=0.9).explain(question)
    assert strict.details["together"] == {}
    assert strict.notes == ()
    assert (strict.scores == AtMan(kappa=None).explain(question).scores).all()


def test_sentences_of_one_form_are_alike_whatever_they_say_so_only_words_are_grouped() -> None:
    question = asked("the lamp in the hall is red . the lamp in the hall is blue .", "sentence")
    assert AtMan().explain(question).details["together"] == {}
    cause, twin = AtMan().explain(question).scores
    assert cause > 10 * abs(twin)
    cause, twin = AtMan(grouped=("sentence",)).explain(question).scores
    assert twin > 0.7 * cause


class Turned:
    """Records the factors that it is asked; the value falls by the share taken from each unit."""

    readout, capabilities = "log-probability (nats)", frozenset({"text", "suppression", "embeddings"})
    weights = np.array([[0.5, 0.0], [1.0, 0.5], [0.0, -2.0], [0.0, 0.0]])

    def __init__(self, embeddings: Any = None) -> None:
        self.table = np.array(np.eye(4) if embeddings is None else embeddings, float)
        self.units = Units("word", tuple("abcd"), tuple(((i, i + 1),) for i in range(4)))
        self.asked: list[tuple[np.ndarray, str]] = []

    def ask(self, keep: np.ndarray) -> np.ndarray:
        raise AssertionError("nothing is removed")

    def suppress(self, factor: np.ndarray, how: str = "multiply") -> np.ndarray:
        self.asked.append((factor, how))
        return -((1 - factor) @ self.weights)

    def embeddings(self) -> np.ndarray:
        return self.table


def test_each_unit_is_turned_down_once_and_scores_add_up_over_the_target() -> None:
    question = Turned()
    e = AtMan().explain(question)
    ((factor, how),) = question.asked
    np.testing.assert_allclose(factor, np.concatenate([np.ones((1, 4)), np.where(np.eye(4), 0.1, 1)]))
    assert how == "multiply"
    assert e.scores == pytest.approx(0.9 * question.weights.sum(1))
    assert e.cost.runs == 5


def test_like_units_keep_the_more_the_less_they_are_alike() -> None:
    question = Turned([[1, 0, 0], [0.8, 0.6, 0], [0, 0, 0], [5, 0, 0]])
    AtMan(how="bias").explain(question)
    ((factor, how),) = question.asked
    near = 1 - 0.9 * 0.8
    expected = [[0.1, near, 1, 0.1], [near, 0.1, 1, near], [1, 1, 0.1, 1], [0.1, near, 1, 0.1]]
    np.testing.assert_allclose(factor[1:], expected)
    assert how == "bias"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_a_bias_is_what_the_library_itself_does_with_a_mask_of_numbers(kind: str) -> None:
    question = tiny_question(kind)
    scores = AtMan(how="bias").explain(question).scores
    ids = np.concatenate([question.run.prompt_ids, question.run.output_ids[:-1]])
    n, first = len(ids), len(question.run.prompt_ids) - 1
    causal = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)[None, None]
    values = []
    for places in [(), *question.places]:
        mask = causal.clone()
        mask[..., list(places)] += np.log(0.1)
        mask = mask.clamp(min=torch.finfo(torch.float32).min)
        with torch.no_grad():
            said = question.adapter.model(input_ids=torch.from_numpy(ids)[None], attention_mask=mask).logits[0, first:]
        said = said.log_softmax(-1).gather(1, torch.from_numpy(question.run.output_ids)[:, None])
        values.append(float(said.sum()))
    assert scores == pytest.approx(values[0] - np.array(values[1:]), abs=2e-3)
    assert abs(scores).max() > 0.01


def test_multiplying_is_the_paper_s_equation_worked_out_by_hand() -> None:
    question = asked("a red lamp is near one door")
    model = reader().model
    head = model.model.layers[0].self_attn
    words = ("<begin>", "a", "red", "lamp", "is", "near", "one", "door", "?")
    x = torch.stack([code(w) for w in words]).double()
    normed = x * CODES**0.5  # every word has the length 1
    w = {name: getattr(head, f"{name}_proj").weight.detach().double() for name in "qkvo"}
    h = (normed @ w["k"].T) @ (normed[-1] @ w["q"].T)
    h = h - h.min()
    values = []
    unembed = model.lm_head.weight.detach().double()
    for turned in (None, *range(1, 8)):
        left = torch.ones(9).double()
        if turned is not None:
            left[turned] = 0.1
        mass = (h * left / CODES**0.5).softmax(0)
        out = x[-1] + w["o"] @ (mass @ (normed @ w["v"].T))
        out = out / out.square().mean().sqrt()
        values.append(float((unembed @ out).log_softmax(0)[WORDS.index("yes")]))
    assert AtMan().explain(question).scores == pytest.approx(values[0] - np.array(values[1:]), abs=1e-4)


@pytest.mark.parametrize("how", ["multiply", "bias"])
def test_scores_do_not_depend_on_the_size_of_a_pass_or_the_order_of_units(how: str) -> None:
    one, small = (AtMan(how=how).explain(tiny_question("llama", level="word", **m)) for m in ({}, {"megabytes": 1e-4}))
    assert one.scores == pytest.approx(small.scores, abs=1e-3)
    question = tiny_question("llama", level="word")
    order = np.random.default_rng(0).permutation(len(question.units))
    moved = question._like(numbers=[question.numbers[i] for i in order])
    assert AtMan(how=how).explain(moved).scores == pytest.approx(one.scores[order], abs=1e-3)


def test_scores_of_pieces_of_the_target_add_up() -> None:
    question = tiny_question("gpt2")
    whole = AtMan().explain(question).scores
    n = len(question.run.output_ids)
    assert n > 1
    parts = [AtMan().explain(question.over(i, i + 1)).scores for i in range(n)]
    assert np.sum(parts, 0) == pytest.approx(whole, abs=1e-4)


def test_it_costs_a_forward_for_each_unit_and_one() -> None:
    metered = Metered(tiny_question("llama"), Budget(forwards=4, backwards=0))
    e = AtMan().explain(metered)
    assert metered.spent.forwards == e.cost.runs == 4
    assert (AtMan().explain(tiny_question("llama")).scores == e.scores).all()


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"factor": 0.0}, "between 0 and 1"), ({"factor": 1.5}, "between 0 and 1"), ({"how": "cut"}, "multiply, bias"),
     ({"kappa": 0.0}, "each alone")],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused_before_the_model_is_asked(settings: dict[str, Any], says: str) -> None:
    question = Turned()
    with pytest.raises(MethodError, match=says):
        AtMan(**settings).explain(question)
    assert not question.asked


def test_questions_without_attention_to_turn_down_or_embeddings_are_refused() -> None:
    class Closed(Turned):
        capabilities = frozenset({"text"})

    class Plain(Turned):
        capabilities = frozenset({"text", "suppression"})

    with pytest.raises(MethodError, match="no suppression"):
        AtMan().explain(Closed())
    with pytest.raises(MethodError, match=r"AtMan\(kappa=None\)"):
        AtMan().explain(Plain())
    assert AtMan(kappa=None).explain(Plain()).cost.runs == 5
    with pytest.raises(MethodError, match="a Question"):
        AtMan().explain("a text")  # type: ignore[arg-type]
