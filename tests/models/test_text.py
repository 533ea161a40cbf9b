"""Language-model adapters and questions about what they wrote: characters, tokens, versions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sentences import CAUSAL, tiny, tokenizer

from whence.errors import MethodError, ModelError, PromptError, RunError
from whence.models.text import EncoderDecoder, LanguageModel
from whence.models.text_question import PromptQuestion
from whence.question import Budget, Metered
from whence.segments import split
from whence.text import TextRun, TextSettings

PROMPT = "Anna is in the kitchen. Ben has the key. Clara took the lamp.\nQuestion: Where is Anna?\nAnswer:"
BOTH = ("t5", "bart")


def adapter(kind: str) -> LanguageModel:
    return (EncoderDecoder if kind in BOTH else LanguageModel)(tiny(kind), tokenizer(), kind)


def asked(kind: str = "llama", **choices: Any) -> tuple[TextRun, PromptQuestion]:
    run = adapter(kind).write(TextSettings(PROMPT, max_tokens=6))
    assert run.model is not None
    tree = split(run.prompt, fixed=[(PROMPT.index("Question"), len(PROMPT))])
    return run, run.model.question(run, tree, **choices)


@pytest.mark.parametrize("kind", [*CAUSAL, *BOTH])
def test_what_is_written_is_what_transformers_itself_generates(kind: str) -> None:
    a = adapter(kind)
    run = a.write(TextSettings(PROMPT, max_tokens=8))
    ids = torch.tensor([list(run.prompt_ids)])
    with torch.no_grad():
        theirs = a.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, pad_token_id=1
        )[0].tolist()
    theirs = theirs[1:] if kind in BOTH else theirs[len(ids[0]) :]
    assert list(run.output_ids) == [t for t in theirs if t != 1][: len(run.output_ids)]
    assert run.replays()


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_seed_writes_the_same_twice_and_another_seed_something_else(kind: str) -> None:
    a = adapter(kind)
    one, two, other = (a.write(TextSettings(PROMPT, max_tokens=12, seed=s, temperature=3.0)) for s in (1, 1, 2))
    assert one.text == two.text
    assert one.text != other.text


def test_the_characters_of_the_tokens_make_up_the_text() -> None:
    run, _ = asked()
    assert "".join(run.text[a:b] for a, b in run.output_spans) == run.text
    assert run.prompt[run.prompt_spans[-1][0] : run.prompt_spans[-1][1]] == ":"
    said = run.again(forced=" Ben has the key.")
    assert said.tokens_of((0, len(said.text))) == said.tokens_of(None) == range(len(said.output_ids))
    key = said.tokens_of("key")
    assert "key" in said.text[said.output_spans[key[0], 0] : said.output_spans[key[-1], 1]]
    assert len(key) < len(said.output_ids)
    with pytest.raises(PromptError, match="0 <= start < end"):
        run.tokens_of((3, 10_000))
    with pytest.raises(PromptError, match="not in what the model wrote"):
        run.tokens_of("no such words in there")


def test_words_of_several_bytes_keep_their_place() -> None:
    run = adapter("gpt2").write(TextSettings("Wo ist der Schlüssel? 鍵", forced=" Ünter der Brücke 🗝."))
    covered = {i for a, b in run.output_spans for i in range(a, b)}
    assert covered == set(range(len(run.text)))
    units = split(run.prompt).units("word")
    assert "Schlüssel" in units.names


def test_dropped_units_leave_a_text_that_reads_as_if_they_had_never_stood_there() -> None:
    _, q = asked()
    assert list(q.units) == ["Anna is in the kitchen.", "Ben has the key.", "Clara took the lamp."]
    assert q.text(np.array([True, False, True])) == PROMPT.replace(" Ben has the key.", "")
    assert q.text(np.array([False, False, False])) == PROMPT[PROMPT.index("Question") :]
    assert q.text(np.array([True, True, True])) == PROMPT


@pytest.mark.parametrize("kind", [*CAUSAL, *BOTH])
def test_a_question_gives_what_the_model_says_of_the_shorter_prompt(kind: str) -> None:
    run, q = asked(kind)
    keep = np.array([[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]], bool)
    found = q.ask_tokens(keep)
    for row, values in zip(keep, found, strict=True):
        again = run.again(prompt=q.text(row), forced=run.text)
        if list(again.output_ids) == list(run.output_ids):  # the output's text makes the same tokens again
            np.testing.assert_allclose(values, again.logprobs, atol=3e-5)
    np.testing.assert_allclose(found[0], run.logprobs, atol=3e-5)
    np.testing.assert_allclose(q.ask(keep), found.sum(1))


def test_any_piece_of_the_output_can_be_chosen_afterwards_without_asking_again() -> None:
    _, q = asked()
    keep = ~np.eye(3, dtype=bool)
    whole = q.ask_tokens(keep)
    before = q.forwards
    part = q.over(1, 3)
    np.testing.assert_allclose(part.ask(keep), whole[:, 1:3].sum(1))
    assert (q.forwards, part.forwards) == (before, 0)


def test_finer_units_are_the_parts_of_coarser_ones_and_the_rest_is_kept() -> None:
    _, q = asked()
    assert q.levels == ("sentence", "phrase", "word")
    words = q.refine([1]).refine([0])
    assert list(words.units) == ["Ben", "has", "the", "key", "."]
    assert words.text(np.array([0, 1, 1, 1, 1], bool)).startswith("Anna is in the kitchen. has the key. Clara")
    with pytest.raises(MethodError, match="no parts"):
        words.refine([0])


def test_the_mean_takes_the_place_of_tokens_and_none_moves() -> None:
    _, q = asked(removal="mean")
    v = q.version(np.array([True, False, True]))
    assert len(v.prompt) == len(q.run.prompt_ids)
    assert np.isfinite(q.ask(~np.eye(3, dtype=bool))).all()
    with pytest.raises(MethodError, match="drop, mean"):
        asked(removal="zero")


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral"])
def test_gradients_attention_and_suppression_speak_of_the_same_units(kind: str) -> None:
    run, q = asked(kind)
    assert {"gradients", "attention", "suppression", "embeddings"} <= q.capabilities
    x = q.inputs.requires_grad_()
    value = q.forward(x)
    assert value.item() == pytest.approx(run.logprobs.sum(), abs=1e-3)
    value.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert set(q.unit_of.unique().tolist()) == {-1, 0, 1, 2}
    assert q.background(2).shape[0] == 2
    mass = q.attention()
    assert ((mass >= 0) & (mass <= 1)).all()
    ones = q.suppress(np.ones((1, 3)))
    np.testing.assert_allclose(ones.sum(), run.logprobs.sum(), atol=1e-3)
    with pytest.raises(MethodError, match="above 0"):
        q.suppress(np.zeros((1, 3)))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "mistral", "gemma2", "gemma3", "mamba"])
def test_gradients_with_shortcuts_are_those_of_a_plain_pass(kind: str) -> None:
    run, q = asked(kind)
    model: Any = run.model.model  # type: ignore[union-attr]
    x = q.inputs.requires_grad_()
    logits = model(inputs_embeds=x, use_cache=False).logits[0, len(run.prompt_ids) - 1 :].log_softmax(-1)
    said = logits.gather(-1, torch.as_tensor(run.output_ids)[:, None])[:, 0]
    wanted = torch.stack([torch.autograd.grad(s, x, retain_graph=True)[0][0] for s in said])
    found, whole = q.slopes(), torch.autograd.grad(q.forward(x).sum(), x)[0]
    size = float(wanted.abs().max())
    torch.testing.assert_close(found, wanted, atol=1e-4 * size, rtol=1e-3)
    torch.testing.assert_close(whole[0], wanted.sum(0), atol=3e-4 * size, rtol=1e-3)
    assert q._asked.narrow is True
    torch.testing.assert_close(q.over(2, 4).slopes(), found[2:4], atol=1e-5 * size, rtol=1e-4)
    two = q.forward(torch.cat([x, q.background(1)]))
    assert two[0].item() == pytest.approx(run.logprobs.sum(), abs=1e-3)
    assert two[1].item() == pytest.approx(q.forward(q.background(1)).item(), abs=1e-3)


def test_a_metered_question_counts_all_ways_of_asking() -> None:
    _, q = asked()
    m = Metered(q, Budget(forwards=20))
    m.ask_tokens(np.ones((2, 3), bool))
    m.suppress(np.ones((3, 3)))
    m.refine([0]).ask(np.ones((4, 1), bool))
    m.over(0, 1).ask(np.ones((1, 3), bool))
    assert m.spent.forwards == 10


def test_wrong_input_is_refused_before_any_work() -> None:
    a = adapter("llama")
    with pytest.raises(PromptError, match="empty"):
        a.write(TextSettings("  \n"))
    with pytest.raises(PromptError, match="reads 256 in all"):
        a.write(TextSettings("Anna is in the kitchen. " * 80))
    with pytest.raises(PromptError, match="reads 256 in all"):
        a.write(TextSettings("Anna is here.", forced=" Ben has the key." * 80))
    with pytest.raises(PromptError, match="less than 256"):
        a.write(TextSettings("Anna is here.", max_tokens=300))
    with pytest.raises(PromptError, match="reads 256 and writes 256"):
        adapter("bart").write(TextSettings("Anna is in the kitchen. " * 80))
    assert adapter("t5").write(TextSettings("Anna is in the kitchen. " * 80, max_tokens=2)).text
    with pytest.raises(PromptError, match="nothing is cut silently"):
        asked()[1].reword([{0: "Anna is in the kitchen. " * 80}])
    with pytest.raises(PromptError, match="chat template"):
        a.write(TextSettings("Anna", template=True))
    with pytest.raises(RunError, match="nothing to write"):
        a.write(TextSettings("Anna", max_tokens=0))

    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="which characters"):
        LanguageModel(tiny("llama"), Slow())


def test_a_chat_template_begins_once() -> None:
    a = adapter("llama")
    a.tokenizer = tokenizer().__class__(tokenizer_object=tokenizer().backend_tokenizer, bos_token="<|begin|>",
                                        eos_token="<|end|>", pad_token="<|end|>")  # fmt: skip
    a.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}Answer:"
    )
    run = a.write(TextSettings("Where is Anna?", template=True, max_tokens=3))
    assert run.prompt == "user: Where is Anna?\nAnswer:"
    assert list(run.prompt_ids).count(0) == 1
