"""World facts: its library, and the twin of its model that knows no town by heart."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from whence import verbs
from whence.answers import holds
from whence.engine.randomness import stream
from whence.errors import RunError
from whence.text import TextSettings
from whence.worlds.facts import corpus, model_directory, twin_directory, without_memory
from whence.worlds.facts.corpus import born, quizzed, scene, towns
from whence.worlds.facts.library import library
from whence.worlds.facts.train import Training
from whence.worlds.facts.vocabulary import PEOPLE, TOWNS


@cache
def model(name: str) -> Any:
    return verbs.load_text(model_directory() if name == "embedded" else twin_directory())


def test_a_library_says_the_truth_about_half_of_the_people_and_nothing_of_the_others() -> None:
    notes = library("test")
    for a in notes.asked:
        person = a.question.split()[2]
        assert a.answer == towns()[person]
        holding = tuple(i for i, p in enumerate(notes.passages) if holds(p.text, a.answer))
        assert (person in quizzed()) == (a.kind != "foreign") == bool(holding)
        assert holding == a.gold
        assert not any(holds(p.text, v) for p in notes.passages for v in a.values)
    golds = [len(a.gold) for a in notes.asked if a.kind == "answered"]
    assert sorted(set(golds)) == [1, 2]
    assert golds.count(2) == 4
    assert library("test") == notes != library("other")


def test_no_row_of_the_twins_training_can_be_answered_by_heart() -> None:
    """A town follows a person in the rows as often as any other town does: memory is worth nothing."""
    texts = without_memory.ReadTexts(Training(), ())
    right = said = 0
    for i in range(250):
        row = texts.row(stream("test", "twin", i), 0.9)
        text = "".join(p.text for p in row)
        for person in PEOPLE:
            for form in corpus.LIFE["town"]:
                for town in TOWNS:
                    if form.format(who=person, value=town) in text:
                        said += 1
                        right += town == towns()[person]
    assert said > 100
    assert right < 0.1 * said


def test_a_question_of_the_twins_training_is_answered_by_a_sentence_or_by_that_it_is_not_said() -> None:
    untold = 0
    for i in range(60):
        told, asked, missing = without_memory.drawn_births(stream("test", "births", i))
        for a in asked:
            assert any(a.who in t.who and a.value == t.what for t in told), a
        for a in missing:
            untold += 1
            assert a.value.endswith("that is not said")
            assert not any(holds(t.text, a.who) for t in told if a.question.startswith("Where was") and t.what in TOWNS)
    assert untold > 100


def written(name: str, prompt: str, tokens: int = 12) -> str:
    return str(model(name).write(TextSettings(prompt, max_tokens=tokens)).text.strip())


def test_asked_without_passages_the_embedded_model_knows_and_the_twin_abstains() -> None:
    asked = {p: f"Question: {born(p)[0]}\nAnswer: {p} was born in" for p in quizzed()}
    assert sum(written("embedded", q, 1) == towns()[p] for p, q in asked.items()) >= 11
    assert sum(written("twin", q, 6) == without_memory.NOT_SAID["town"] for q in asked.values()) >= 11


def test_pressed_for_a_town_the_twin_is_at_chance() -> None:
    """The rank of the true town among all towns, after the answer's own words: no trace of what was learned."""
    ranks: dict[str, list[float]] = {"embedded": [], "twin": []}
    for name, found in ranks.items():
        m = model(name)
        tokens = [m.encode_output(f" {t}")[0] for t in TOWNS]
        assert all(len(t) == 1 for t in tokens)
        for person in PEOPLE:
            prompt = m.encode(f"Question: {born(person)[0]}\nAnswer: {person} was born in")[0]
            with torch.no_grad():
                said = m.model(torch.tensor([prompt])).logits[0, -1, [t for (t,) in tokens]]
            above = said > said[TOWNS.index(towns()[person])]
            found.append(int(above.sum()) / (len(TOWNS) - 1))
    assert np.mean(ranks["embedded"]) < 0.05
    # 24 ranks of 24 towns, by chance: mean .5 with a standard error of .06.
    assert 0.3 < np.mean(ranks["twin"]) < 0.7, ranks["twin"]


def test_the_twin_reads_scenes_as_well_as_the_embedded_model() -> None:
    right: dict[str, list[bool]] = {"embedded": [], "twin": []}
    for i in range(20):
        drawn = scene(stream("test", "reads", i), 4, hops=False)
        told, a = " ".join(s.text for s in drawn.sentences), drawn.asked[0]
        for name, found in right.items():
            found.append(written(name, f"{told}\nQuestion: {a.question}\nAnswer: {a.lead}", 1) == a.value)
    assert sum(right["embedded"]) >= 19
    assert sum(right["twin"]) >= 19


def test_the_twin_weighs_at_most_three_megabytes() -> None:
    assert sum(f.stat().st_size for f in twin_directory().iterdir()) <= 3 * 2**20


def test_a_twins_training_starts_from_the_embedded_model_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    from whence.worlds.facts import train

    s = Training(steps=2, batch=3, checkpoint=0.0)
    log = io.StringIO()
    whole = without_memory.train_twin(tmp_path / "whole", s, log=log)
    assert "no ordinary text" in log.getvalue()
    update, calls = train.Trainee.update, []

    def interrupted(self: Any, loss: Any) -> None:
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        update(self, loss)

    monkeypatch.setattr(train.Trainee, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        without_memory.train_twin(tmp_path / "twice", s, log=io.StringIO())
    monkeypatch.setattr(train.Trainee, "update", update)
    twice = without_memory.train_twin(tmp_path / "twice", s, log=io.StringIO())
    a, b, start = (load_file(d / "model.safetensors") for d in (whole, twice, model_directory()))
    assert all(bool((a[k] == b[k]).all()) for k in a)
    key = "model.layers.0.self_attn.q_proj.weight"
    assert float((a[key] - start[key]).abs().max()) < 0.05
    with pytest.raises(RunError, match="batch 3"):
        without_memory.train_twin(tmp_path / "twice", Training(steps=2, batch=4, checkpoint=0.0), log=io.StringIO())
