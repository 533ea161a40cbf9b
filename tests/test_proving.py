"""Proving: rows that can fail, and that say why."""

import json

import numpy as np
import pytest

import whence
from whence import proving
from whence.errors import MethodError, RunError
from whence.models.loading import load
from whence.models.small_stable_diffusion import build_pipeline
from whence.proving import together
from whence.verdict import judge
from whence.worlds import trial
from whence.worlds.shapes import trials
from whence.worlds.shapes.scenes import WORDS


def test_a_model_in_which_no_cause_can_be_certified_is_not_shown_with_the_reason(monkeypatch):
    monkeypatch.setattr(proving, "trial_of", lambda card: trials.twins)
    monkeypatch.setattr(trials, "STEPS", 3)  # it never learned: more of them draw no more
    row = proving.try_method("daam", 1, load(build_pipeline(WORDS, seed=1)))
    assert row["word"] == "not shown"
    assert "1 pictures for the trial shapes.twins" in row["reason"]
    assert "verdict" not in row


def test_a_check_is_tested_and_not_tried():
    row = proving.try_method("swap", 1, model=None)
    assert row["word"] == "tested"
    assert "tests/checks" in row["reason"]


def test_the_trial_of_everything_names_the_claims_that_it_leaves_out():
    brief = proving._Trials(False, None, None, None, brief=True)
    (row,) = proving._rows("a_star", brief, (None, None), None)
    assert row["word"] == proving.NOT_NOW
    assert "whence prove a_star" in row["reason"]


def test_an_unknown_method_is_refused_before_any_model_is_loaded(monkeypatch):
    monkeypatch.setattr("whence.verbs.load", lambda: pytest.fail("loaded"))
    with pytest.raises(MethodError, match="'daam'"):
        proving.prove(["damm"])


def test_the_small_door_opens_on_what_it_names():
    assert {whence.Run.__name__, whence.Verdict.__name__, whence.explain.__name__} == {"Run", "Verdict", "explain"}
    assert all(getattr(whence, name) is not None for name in whence.__all__)
    with pytest.raises(AttributeError, match="no attribute 'utils'"):
        whence.utils  # noqa: B018


def test_settings_that_a_method_lacks_are_named():
    with pytest.raises(MethodError, match="thresh"):
        whence.explain(None, by="daam", thresh=0.1)


MINE = """
import numpy as np

def first(question):
    return np.arange(len(question.units), 0, -1.0)

def last(question):
    return np.arange(len(question.units)) * 1.0
"""


def test_rows_and_journal_are_the_same_from_one_process_and_from_two(tmp_path, monkeypatch):
    monkeypatch.setattr(proving, "DRAWS", 2)
    (tmp_path / "mine.py").write_text(MINE)
    names = [f"{tmp_path / 'mine.py'}:{n}" for n in ("first", "last")]

    def told(rows):
        return [{k: v for k, v in row.items() if k not in ("seconds", "spent")} for row in rows]

    journal = tmp_path / "journal.jsonl"
    one = proving.prove(names, world="twins", journal=journal)
    lines = journal.read_text().splitlines()
    for name in ("first", "last"):  # each has its own shuffled control, with which it shares nothing but the file
        assert sum(json.loads(line)["what"][0] == f"{name}, shuffled" for line in lines) == 2
    monkeypatch.setattr(trial, "try_draw", lambda *_: pytest.fail("done again"))
    assert told(proving.prove(names, world="twins", journal=journal)) == told(one)
    assert journal.read_text().splitlines() == lines
    monkeypatch.undo()

    # Workers do not see what this test changed, so they take as many draws as a user gets.
    steps = []
    two = proving.prove(names, advance=lambda n=1, note="": steps.append(n), world="circuits", jobs=2)
    assert sum(steps) == 2 * proving.DRAWS == proving.pieces(names, False, "circuits")
    assert told(two) == told(proving.prove(names, world="circuits"))


def test_an_error_of_a_worker_arrives_whole(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    names = [f"{tmp_path / 'mine.py'}:{n}" for n in ("frist", "last")]
    with pytest.raises(RunError, match="would work: 'first'"):
        proving.prove(names, world="twins", jobs=2)


def test_a_journal_does_not_take_another_explainer_of_the_same_name_for_this_one(tmp_path, monkeypatch):
    monkeypatch.setattr(proving, "DRAWS", 2)
    path, journal = tmp_path / "mine.py", tmp_path / "journal.jsonl"
    path.write_text(MINE)
    before = proving.prove([f"{path}:first"], world="twins", journal=journal)
    path.write_text(MINE.replace("first", "x").replace("last", "first"))
    after = proving.prove([f"{path}:first"], world="twins", journal=journal)
    assert before[0]["panel"] != after[0]["panel"]  # by AUC, positions are at chance by construction


def test_many_rows_together_are_corrected_and_bounds_are_left_out():
    def row(name, effects, **more):
        v = judge(effects, np.zeros(len(effects)), claim=name, delta=0.1, alpha=0.05, replicate="draw")
        return {"method": name, "word": v.word, "verdict": v.record(), **more}

    rng = np.random.default_rng(0)
    weak = row("weak", [0.5, 0.05, 0.45, 0.1, 0.4, 0.02])
    strong = row("strong", 0.4 + 0.01 * rng.normal(size=6))
    nulls = [row(f"null {i}", 0.1 * rng.normal(size=6)) for i in range(10)]
    assert weak["word"] == strong["word"] == "supported"
    assert together([weak])[0]["word"] == "supported"
    found = {r["method"]: r for r in together([weak, strong, *nulls, {"method": "no trial", "word": "tested"}])}
    assert found["strong"]["word"] == "supported"
    assert found["weak"]["word"] == "undecided"
    assert "12 claims" in found["weak"]["reason"]
    assert found["no trial"] == {"method": "no trial", "word": "tested"}
    bound = row("floor", [0.5, 0.05, 0.45, 0.1, 0.4, 0.02], bound="floor")
    assert together([bound, *nulls])[0] == bound


def test_the_shuffled_control_has_the_answers_that_were_given_and_asks_for_none():
    asked = []

    def first(question):
        asked.append(question.units)
        return np.arange(len(question.units), 0, -1.0)

    world, draws = proving.Ground(2)["twins"]
    row = proving.try_explainer("first", first, world, draws, asked_of=["single"])
    questions = [p for d in draws for p in d.planted if p.structure == "single"]
    assert len(asked) == sum(2 + len(p.nulls) for p in questions)
    assert row["controls"]["shuffled"]["n"] == 2
    assert list(row["panel"]) == ["single"]


def test_rows_of_one_world_share_a_process_unless_they_are_most_of_the_work():
    trials = proving._Trials(False, None, None, None)
    tasks = ["mexgen", "atman", "saliency", "lime", "grad_dot", "bounds of facts", "lds"]
    shares = proving._shares(tasks, trials, 2)
    assert sorted(t for s in shares for t in s) == sorted(tasks)
    assert {"saliency", "lime"} in map(set, shares)
    (halved,) = [s for s in proving._shares(["mexgen", "atman"], trials, 2) if "atman" in s]
    assert halved == ["atman"]
    assert len(proving._shares(["mexgen", "atman"], trials, 1)) == 1
