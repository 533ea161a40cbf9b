"""Classifiers of texts as questions: which words made it say this class?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentences import WORDS, tokenizer

from whence.ablations.leave_one_out import LeaveOneOut
from whence.errors import MethodError, ModelError, PromptError, RunError
from whence.inputs.context_cite import ContextCite
from whence.models.text_classifier import TextClassifier
from whence.models.text_loading import load_text
from whence.segments import split
from whence.text import TextRun, TextSettings

TEXT = "Anna is in the kitchen. Ben has the key, and Clara took the lamp."
KINDS = ("bert", "roberta", "distilbert", "gpt2", "llama")
CLASSES = {0: "calm", 1: "glad", 2: "sad"}


def tiny(kind: str, labels: int = 3, **more: Any) -> Any:
    import transformers as t

    named = {"id2label": {i: CLASSES.get(i, str(i)) for i in range(labels)}, "num_labels": labels, **more}
    same: dict[str, Any] = {
        "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 1, **named,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "bert":
        return t.BertForSequenceClassification(t.BertConfig(**same)).eval()
    if kind == "roberta":
        return t.RobertaForSequenceClassification(t.RobertaConfig(**same)).eval()
    if kind == "distilbert":
        config = t.DistilBertConfig(
            vocab_size=WORDS, dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=64,
            initializer_range=0.3, pad_token_id=1, **named,
        )  # fmt: skip
        return t.DistilBertForSequenceClassification(config).eval()
    if kind == "gpt2":  # without padding
        config = t.GPT2Config(
            vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, bos_token_id=0,
            eos_token_id=1, **named,
        )  # fmt: skip
        return t.GPT2ForSequenceClassification(config).eval()
    return t.LlamaForSequenceClassification(t.LlamaConfig(**same)).eval()


def adapter(kind: str = "bert", **more: Any) -> TextClassifier:
    return TextClassifier(tiny(kind, **more), tokenizer(), kind)


def asked(kind: str = "bert", **choices: Any) -> tuple[TextRun, Any]:
    run = adapter(kind).write(TextSettings(TEXT))
    assert run.model is not None
    return run, run.model.question(run, split(run.prompt), **{"level": "word", **choices})


@pytest.mark.parametrize("kind", KINDS)
def test_the_class_that_the_model_says_is_written_and_any_other_can_be_asked_about(kind: str) -> None:
    a = adapter(kind)
    ids = torch.tensor([a.encode(TEXT)[0]])
    with torch.no_grad():
        law = a.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].log_softmax(-1)
    run = a.write(TextSettings(TEXT))
    assert run.text == CLASSES[int(law.argmax())]
    assert run.logprobs[0] == pytest.approx(float(law.max()), abs=1e-5)
    for k, name in CLASSES.items():
        assert a.write(TextSettings(TEXT, forced=name)).logprobs[0] == pytest.approx(float(law[k]), abs=1e-5)


@pytest.mark.parametrize("removal", ["drop", "mean", "mask"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_version_gets_the_number_of_one_plain_pass(kind: str, removal: str) -> None:
    t = tokenizer()
    t.mask_token = t.bos_token
    run, q = asked(kind, removal=removal)
    keep = np.random.default_rng(0).random((12, len(q.units))) < 0.6
    found = q.ask(keep)
    model, target = run.model.model, int(run.output_ids[0])  # type: ignore[union-attr]
    table = model.get_input_embeddings().weight
    for row, value in zip(keep, found, strict=True):
        ids = torch.tensor(run.prompt_ids)
        x = table[ids].clone()
        gone = [p for unit, places in enumerate(q.places) for p in places if not row[unit]]
        if removal == "drop":
            x = table[torch.tensor(q.adapter.encode(q.text(row))[0])]
        else:
            x[gone] = table[ids].mean(0) if removal == "mean" else table[t.mask_token_id]
        with torch.no_grad():
            law = model(inputs_embeds=x[None], attention_mask=torch.ones(1, len(x))).logits[0].log_softmax(-1)
        assert value == pytest.approx(float(law[target]), abs=2e-5)


def test_the_word_that_decides_the_class_scores_highest_and_a_random_score_does_not_find_it() -> None:
    """A model trained for a moment: texts with 'key' are glad, all others calm."""
    a = adapter(labels=2)
    words = [w for w in TEXT.replace(".", "").replace(",", "").split() if w != "key"]
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(a.model.parameters(), 3e-3)
    for _ in range(60):
        glad = rng.random(16) < 0.5
        texts = [list(rng.choice(words, 9)) for _ in glad]
        for text, yes in zip(texts, glad, strict=True):
            text[int(rng.integers(9))] = "key" if yes else "lamp"
        given = a.tokenizer([" ".join(t) for t in texts], padding=True, return_tensors="pt")
        logits = a.model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(glad.astype(int)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    a.model.requires_grad_(False)
    first, random = [], []
    for _ in range(12):
        text = list(rng.choice(words, 9, replace=False))
        text[int(rng.integers(9))] = "key"
        run = a.write(TextSettings(" ".join(text)))
        if run.text != "glad":
            continue
        q = a.question(run, split(run.prompt), level="word", removal="mean")
        names = q.units.names
        first += [names[int(m.explain(q).totals.argmax())] == "key" for m in (LeaveOneOut(draws=1), ContextCite())]
        slope = (q.slopes()[0] * q.inputs[0]).sum(-1)
        assert slope.shape == (len(run.prompt_ids),)
        random += [names[int(rng.integers(len(names)))] == "key" for _ in range(2)]
    assert len(first) >= 12
    assert np.mean(first) >= 0.8
    assert np.mean(random) <= 0.4


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_gradients_speak_of_the_class(kind: str) -> None:
    run, q = asked(kind)
    x = q.inputs.requires_grad_()
    value = q.forward(torch.cat([x, x]))
    assert value.tolist() == pytest.approx([float(run.logprobs[0])] * 2, abs=1e-4)
    value.sum().backward()
    torch.testing.assert_close(q.slopes(), x.grad / 2)
    assert q.forward(q.background(2)).shape == (2,)


def test_several_classes_that_may_hold_at_once_are_each_asked_by_itself() -> None:
    a = adapter(problem_type="multi_label_classification")
    ids = torch.tensor([a.encode(TEXT)[0]])
    with torch.no_grad():
        logits = a.model(input_ids=ids).logits[0]
    assert a.write(TextSettings(TEXT, forced="sad")).logprobs[0] == pytest.approx(float(logits[2].sigmoid().log()))


def test_a_directory_is_loaded_as_what_it_is(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    loaded = load_text(tmp_path, "cpu")
    assert isinstance(loaded, TextClassifier)
    assert loaded.write(TextSettings(TEXT)).text == adapter().write(TextSettings(TEXT)).text


def test_wrong_input_gets_one_clear_error() -> None:
    with pytest.raises(ModelError, match="one number"):
        adapter(labels=1)
    a = adapter()
    with pytest.raises(PromptError, match="calm, glad, sad"):
        a.write(TextSettings(TEXT, forced="cross"))
    with pytest.raises(RunError, match="likeliest"):
        a.write(TextSettings(TEXT, seed=3))
    for kind, most in (("bert", 64), ("roberta", 62)):
        with pytest.raises(PromptError, match=f"at most {most} tokens"):
            adapter(kind).write(TextSettings(TEXT * 9))
    t = tokenizer()
    t.mask_token = None
    run, q = asked(removal="mask")
    with pytest.raises(MethodError, match="no mask token"):
        q.ask(np.zeros((1, len(q.units)), bool))
    with pytest.raises(MethodError, match="drop, mean, mask"):
        asked(removal="zero")
    assert run.model is not None
    with pytest.raises(MethodError, match="names a class"):
        a.trace(run)
