"""Counterfactuals: the fewest words whose rewording changes the label are found; of the rest no proof is claimed."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from sentences import tiny, tokenizer
from wired_llama import reader

from whence.engine.ablate import Ablation, Version
from whence.engine.randomness import stream
from whence.errors import MethodError, RunError
from whence.inputs.counterfactual import ChatProposer, Counterfactual, LocalProposer, Rules, reworded
from whence.models.text import LanguageModel
from whence.models.text_question import PromptQuestion
from whence.question import Answer
from whence.segments import split
from whence.text import TextSettings
from whence.verdict import SUPPORTED, judge
from whence.worlds.facts.asking import adapter as facts
from whence.worlds.facts.vocabulary import PEOPLE, PLACES

OPPOSITES = {"good": "bad", "clean": "dirty", "kind": "rude", "bright": "dark", "fresh": "stale", "quick": "slow",
             "warm": "cold", "calm": "loud"}  # fmt: skip
ASPECTS = ("food", "room", "staff", "hall", "bread", "service", "soup", "garden")
EDITOR = Rules({a: (b,) for a, b in OPPOSITES.items()})
WORDS = (*OPPOSITES, *OPPOSITES.values(), *ASPECTS, "the", "was", "and", "we", "came", "twice", "a")


class Texts:
    """A black box that reads a text. The units are its words."""

    capabilities = frozenset({"reword", "answers"})
    readout = "probability of the label (0..1)"

    def __init__(self, text: str, value: Callable[[str], float], level: str = "word") -> None:
        self.written, self.value = text, value
        self.units = split(text).units(level)
        self.asked: list[str] = []

    def ask(self, keep: np.ndarray) -> np.ndarray:
        raise AssertionError("nothing is removed")

    def text(self, keep: np.ndarray) -> str:
        assert keep.all()
        return self.written

    def said(self, version: Mapping[int, str]) -> str:
        return reworded(self.written, [m[0] for m in self.units.members], version)

    def reword(self, versions: Sequence[Mapping[int, str]]) -> np.ndarray:
        self.asked += [self.said(v) for v in versions]
        return np.array([self.value(self.said(v)) for v in versions])

    def answers(self, versions: Sequence[Mapping[int, str]]) -> list[str]:
        return ["positive" if self.value(self.said(v)) > 0.5 else "negative" for v in versions]


def review(seed: int, decide: int) -> tuple[Texts, list[str]]:
    """A review whose label stays positive while any of so many words is; and the labels of these words."""
    rng = stream("review", seed)
    aspects, words = rng.permutation(ASPECTS).tolist(), rng.permutation(list(OPPOSITES)).tolist()
    told = [f"the {aspect} was {word}" for aspect, word in zip(aspects, words, strict=True)]
    text = "we came twice , " + " and ".join(told) + " ."
    deciding = rng.choice(8, decide, replace=False).tolist()

    def value(read: str) -> float:
        left = sum(told[i] in read for i in deciding)
        return 0.2 + 0.7 * (0.5 + left / decide / 2 if left else 0.0)

    return Texts(text, value), [words[i] for i in deciding]


def random_swaps(question: Texts, seed: int, words: Callable[[str], Sequence[str]] = lambda word: WORDS) -> int:
    """How many words in a random order become random ones before the label flips (all of them: it never did)."""
    rng, edits = stream("swaps", seed), dict[int, str]()
    for unit in rng.permutation(len(question.units)).tolist():
        among = words(question.units.names[unit])
        if among:
            edits[unit] = str(rng.choice(list(among)))
            if question.answers([edits]) == ["negative"]:
                break
    return len(edits)


def edited(word: str) -> Sequence[str]:
    return EDITOR.words.get(word, ())


@pytest.mark.parametrize("flips", ["answer", "share"])
def test_the_words_that_decide_are_found_with_fewer_edits_than_random_swaps_need(flips: str) -> None:
    right: list[bool] = []
    saved: list[float] = []
    between: list[float] = []
    for seed in range(12):
        question, deciding = review(seed, decide := 1 + seed % 3)
        e = Counterfactual(EDITOR, flips=flips).explain(question)
        edits = e.details["edits"]
        right.append(sorted(before for _, before, _ in edits) == sorted(deciding))
        assert e.details["words_changed"] == len(edits) == decide
        assert question.value(e.details["text"]) < 0.5 < question.value(question.written)
        assert len(edits) < random_swaps(question, seed)
        one, other = (random_swaps(question, 2 * seed + i, edited) for i in range(2))
        saved.append(one - len(edits))  # the harder control: it changes no word that cannot count
        between.append(one - other)
        assert e.details["control"]["flipped"] <= 0.5 * e.details["control"]["n"]
    assert np.mean(right) >= 0.9
    verdict = judge(saved, between, claim="fewer edits than random ones", delta=1.0)
    assert verdict.word == SUPPORTED, verdict.line


def test_scores_are_highest_in_the_words_that_decide_and_dealt_out_they_are_not() -> None:
    found, dealt = [], []
    for seed in range(6):
        question, deciding = review(seed, 1 + seed % 3)
        scores = Counterfactual(EDITOR, flips="answer").explain(question).scores
        planted = {question.units.find(w) for w in deciding}
        found.append(set(np.argsort(-scores)[: len(planted)].tolist()) == planted)
        mixed = stream("dealt", seed).permutation(scores)
        dealt.append(set(np.argsort(-mixed)[: len(planted)].tolist()) == planted)
    assert all(found)
    assert sum(dealt) <= 1


TEXT = "a good and calm and warm day"


def test_two_words_either_of_which_suffices_are_found_together_though_each_alone_does_nothing() -> None:
    question = Texts(TEXT, lambda t: 0.9 if "good" in t or "warm" in t else 0.1)
    e = Counterfactual(EDITOR).explain(question)
    assert [edit[1:] for edit in e.details["edits"]] == [("good", "bad"), ("warm", "cold")]
    assert e.details["sets"] == [["good", "warm"]]
    assert Answer.of(e, question.units).sets == (frozenset({1, 5}),)
    assert set(np.flatnonzero(e.scores > 0).tolist()) == {1, 5}


def test_three_words_that_show_nothing_one_by_one_are_missed_and_no_proof_is_claimed() -> None:
    question = Texts(TEXT, lambda t: 0.9 if any(w in t for w in ("good", "calm", "warm")) else 0.1)
    few = Counterfactual(EDITOR, most_edits=2).explain(question)
    assert not few.details["flipped"]
    assert "no proof that none would" in str(few)
    assert "edits" not in few.details
    all_three = Counterfactual(EDITOR, exhaustive=3).explain(question)
    assert len(all_three.details["edits"]) == 3


def test_words_that_are_each_needed_are_told_as_sets_of_one() -> None:
    question = Texts(TEXT, lambda t: 0.9 if "good" in t and "warm" in t else 0.1)
    e = Counterfactual(EDITOR).explain(question)
    assert len(e.details["edits"]) == 1
    assert e.details["sets"] == [["good"], ["warm"]]
    assert e.details["others"] == [[("warm", "warm", "cold")]]
    assert e.details["lost"] == pytest.approx(8 / 9)


def test_edits_that_are_not_needed_are_taken_back() -> None:
    """ "calm" moves the readout most, so that it is changed first, but only the two others change the label."""

    def value(text: str) -> float:
        rest = 0.4 * ("good" in text) + 0.4 * ("warm" in text)
        return 1.0 if rest else 0.1

    class Led(Texts):
        def reword(self, versions: Sequence[Mapping[int, str]]) -> np.ndarray:
            return super().reword(versions) + np.array([0.5 * ("calm" in self.said(v)) for v in versions])

    e = Counterfactual(EDITOR, flips="answer", exhaustive=1).explain(Led(TEXT, value))
    assert [before for _, before, _ in e.details["edits"]] == ["good", "warm"]


def test_of_a_log_probability_the_share_is_that_of_the_probability() -> None:
    class Nats(Texts):
        readout = "log-probability of 'x' (nats)"

    question = Nats(TEXT, lambda t: -3.0 - 0.5 * ("good" not in t) - 0.8 * ("warm" not in t))
    e = Counterfactual(EDITOR).explain(question)
    assert e.details["edits"] == [("warm", "warm", "cold")]
    assert e.details["lost"] == pytest.approx(1 - np.exp(-0.8))
    assert e.scores[[1, 5]] == pytest.approx([0.5, 0.8])
    both = Counterfactual(EDITOR, share=0.7).explain(question)
    assert both.details["lost"] == pytest.approx(1 - np.exp(-1.3))


def test_no_rewording_is_asked_twice_and_the_cost_is_what_was_asked() -> None:
    question, _ = review(3, 2)
    e = Counterfactual(EDITOR).explain(question)
    assert len(set(question.asked)) == len(question.asked) == e.cost.runs
    again = Counterfactual(EDITOR).explain(review(3, 2)[0])
    assert again.details == e.details
    assert (again.scores == e.scores).all()


def test_a_question_s_own_alternatives_are_used_and_units_without_any_are_named() -> None:
    class Knows(Texts):
        def alternatives(self, unit: int) -> tuple[str, ...]:
            return {"good": ("good", "", "bad"), "day": ("night",)}.get(self.units.names[unit], ())

    e = Counterfactual().explain(Knows(TEXT, lambda t: float("good" in t)))
    assert e.details["edits"] == [("good", "good", "bad")]
    assert e.details["tried"] == 2
    assert "nothing is said of: a, and, calm" in str(e)


def test_a_word_inside_a_sentence_is_replaced_by_rules() -> None:
    question = Texts("the soup was good. we came twice.", lambda t: float("good" in t), "sentence")
    e = Counterfactual(EDITOR).explain(question)
    assert e.details["edits"] == [("the soup was good.", "the soup was good.", "the soup was bad.")]
    assert e.details["text"] == "the soup was bad. we came twice."
    assert e.details["words_changed"] == 1


# --- real language models --------------------------------------------------------------------------------------------


def wired(text: str) -> PromptQuestion:
    run = reader().write(TextSettings(f"{text} ?", forced="yes"))
    return PromptQuestion(reader(), run, split(run.prompt, fixed=[(len(text), len(run.prompt))]), "word")


@pytest.mark.parametrize("place", range(5))
def test_in_a_transformer_wired_to_read_one_word_that_word_is_reworded(place: int) -> None:
    words = ["a", "lamp", "near", "one", "door"]
    words[place] = "red"
    question = wired(" ".join(words))
    e = Counterfactual(Rules(dict.fromkeys(words, ("old", "wide", "hall")))).explain(question)
    assert [before for _, before, _ in e.details["edits"]] == ["red"]
    assert int(e.scores.argmax()) == place
    assert e.details["lost"] > 0.9
    # Over the 15 edits, 3 of them change the answer: so do about 3 of 16 random ones.
    assert e.details["control"]["flipped"] <= 8


def test_two_red_words_have_to_be_reworded_together() -> None:
    rules = Rules(dict.fromkeys(("red", "lamp", "near"), ("old", "wide")))
    e = Counterfactual(rules).explain(wired("red lamp near red"))
    assert [label for label, *_ in e.details["edits"]] == ["red", "red#2"]


PROMPT = "Anna is in the kitchen. Ben has the key."


def tiny_adapter(kind: str) -> LanguageModel:
    return LanguageModel(tiny(kind), tokenizer(), kind)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_local_proposer_orders_words_by_how_likely_they_make_the_text(kind: str) -> None:
    adapter = tiny_adapter(kind)
    start = PROMPT.index("Ben")
    found = LocalProposer(adapter, near=8).propose(PROMPT, (start, start + 3), 5)
    assert 2 <= len(found) <= 5
    assert "Ben" not in found
    assert all(w.isalnum() for w in found)
    left = adapter.encode(PROMPT[: start - 1])[0]

    def likely(word: str) -> float:
        rest = adapter.encode_output(f" {word}{PROMPT[start + 3 :]}")[0]
        return float(Ablation(adapter.model).logprobs([Version(tuple(left), tuple(rest))])[0].sum())

    values = [likely(w) for w in found]
    assert values == sorted(values, reverse=True)
    shuffled = sorted(found)
    assert [likely(w) for w in shuffled] != sorted(values, reverse=True) or shuffled == found


def test_the_explained_model_itself_proposes_where_nothing_else_does() -> None:
    adapter = tiny_adapter("llama")
    run = adapter.write(TextSettings(f"{PROMPT} Where is Anna?", forced=" here"))
    question = PromptQuestion(adapter, run, split(run.prompt, fixed=[(len(PROMPT), len(run.prompt))]), "sentence")
    e = Counterfactual(proposals=3, share=0.1).explain(question)
    assert e.settings["proposer"] == "LocalProposer"
    assert e.details["tried"] >= 6
    if e.details["flipped"]:
        assert e.details["words_changed"] == len(e.details["edits"])  # one word in each sentence


def test_in_the_trained_model_of_facts_the_words_found_are_in_the_sentence_that_the_answer_was_read_from() -> None:
    inside, beside = [], []
    for seed in range(3):
        rng = stream("scene", seed)
        people, places = (rng.permutation(x).tolist()[:3] for x in (PEOPLE, PLACES))
        told = [f"{who} is in the {place}." for who, place in zip(people, places, strict=True)]
        k, text = int(rng.integers(3)), " ".join(told)
        prompt = f"{text}\nQuestion: Where is {people[k]}?\nAnswer: {people[k]} is in the"
        run = facts().write(TextSettings(prompt, forced=f" {places[k]}"))
        question = PromptQuestion(facts(), run, split(prompt, fixed=[(len(text), len(prompt))]), "word")
        e = Counterfactual(LocalProposer(facts(), near=4), proposals=2).explain(question)
        begin = text.index(told[k])
        at = [question.units.members[question.units.find(label)][0][0] for label, *_ in e.details.get("edits", ())]
        inside.append(bool(at) and all(begin <= a < begin + len(told[k]) for a in at))
        beside.append(e.details["control"]["flipped"] / e.details["control"]["n"])
    assert all(inside)
    assert np.mean(beside) < 0.5


# --- a chat endpoint -------------------------------------------------------------------------------------------------


class Stub(BaseHTTPRequestHandler):
    """Answers as a language model might, with bullets, numbers and idle talk."""

    seen: list[tuple[dict[str, Any], str | None]]
    reply: Callable[[str], tuple[int, bytes]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).seen.append((body, self.headers["Authorization"]))
        status, said = type(self).reply(body["messages"][-1]["content"])
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://localhost:1/elsewhere")
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def endpoint(reply: Callable[[str], tuple[int, bytes]]) -> Iterator[tuple[str, list[Any]]]:
    handler = type("Handler", (Stub,), {"seen": [], "reply": staticmethod(reply)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/chat/completions", handler.seen  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def completion(said: Any) -> tuple[int, bytes]:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}).encode()


def editor(asked: str) -> tuple[int, bytes]:
    if "Which latent features" in asked:
        return completion("1. the tone\n2. the weather")
    if "These are the parts" in asked:
        return completion("Here you are:\n- the tone: 2, 4 and 99\n* the weather: 6\nnothing else: none")
    word = asked.split("[[")[1].split("]]")[0]
    return completion(f'1. "{OPPOSITES[word]}"\n2. {word}\n')


def test_a_chat_endpoint_is_asked_all_three_steps_and_only_its_words_are_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WHENCE_TEST_KEY", "secret")
    with endpoint(editor) as (url, seen):
        question = Texts(TEXT, lambda t: 0.9 if "calm" in t else 0.1)
        e = Counterfactual(ChatProposer(url, "tiny", key_from="WHENCE_TEST_KEY")).explain(question)
    assert e.details["features"] == {"the tone": ["good", "calm"], "the weather": ["warm"]}
    assert e.details["edits"] == [("calm", "calm", "loud")]
    assert e.details["tried"] == 3
    assert len(seen) == 2 + 3
    assert {key for _, key in seen} == {"Bearer secret"}
    assert all(body["model"] == "tiny" and body["temperature"] == 0 for body, _ in seen)
    assert [m["role"] for m in seen[1][0]["messages"]] == ["user", "assistant", "user"]
    assert "a [[good]] and calm" in seen[2][0]["messages"][0]["content"]
    assert "secret" not in json.dumps(e.record())


def test_without_a_key_in_the_environment_none_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with endpoint(editor) as (url, seen):
        assert ChatProposer(url, "tiny").propose("a good day", (2, 6), 1) == ["bad"]
    assert seen[0][1] is None


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        ((500, b"broken"), "500"),
        ((302, b""), "302"),
        ((200, b"hello"), "not a chat completion"),
        ((200, b'{"choices": []}'), "not a chat completion"),
        (completion(None), "without text"),
    ],
)
def test_an_endpoint_that_fails_or_sends_elsewhere_is_told_of(reply: tuple[int, bytes], says: str) -> None:
    with endpoint(lambda asked: reply) as (url, _), pytest.raises(RunError, match=says):
        ChatProposer(url, "tiny").propose("a good day", (2, 6), 1)


def test_a_key_goes_to_no_file_and_to_no_far_host_in_the_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    for url, says in (("file:///etc/hosts", "not a web address"), ("http://example.org/v1", "unencrypted")):
        with pytest.raises(MethodError, match=says):
            ChatProposer(url, "tiny").propose("a good day", (2, 6), 1)
    with pytest.raises(RunError, match="running endpoint"):
        ChatProposer("http://127.0.0.1:9/v1", "tiny", seconds=2).propose("a good day", (2, 6), 1)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"flips": "label"}, "share, answer"),
        ({"share": 1.0}, "between 0 and 1"),
        ({"proposals": 0}, "1 or more"),
        ({"at_most": 2}, "for single edits alone"),
    ],
)
def test_a_setting_out_of_range_is_refused_before_the_model_is_asked(settings: dict[str, Any], says: str) -> None:
    question = Texts(TEXT, lambda t: 1.0)
    with pytest.raises(MethodError, match=says):
        Counterfactual(EDITOR, **settings).explain(question)
    assert not question.asked


def test_questions_that_cannot_be_reworded_or_have_nothing_to_put_in_are_refused() -> None:
    class Fixed(Texts):
        capabilities = frozenset({"text"})

    class Silent(Texts):
        capabilities = frozenset({"reword"})

    with pytest.raises(MethodError, match="no reword"):
        Counterfactual(EDITOR).explain(Fixed(TEXT, lambda t: 1.0))
    with pytest.raises(MethodError, match="no answers"):
        Counterfactual(EDITOR, flips="answer").explain(Silent(TEXT, lambda t: 1.0))
    with pytest.raises(MethodError, match="no proposer"):
        Counterfactual().explain(Silent(TEXT, lambda t: 1.0))
    with pytest.raises(MethodError, match="nothing is proposed"):
        Counterfactual(Rules({"tea": ("milk",)})).explain(Silent(TEXT, lambda t: 1.0))
    with pytest.raises(MethodError, match="no share"):
        Counterfactual(EDITOR).explain(Silent(TEXT, lambda t: 0.0))
    with pytest.raises(MethodError, match="reads with an encoder"):
        LocalProposer(type("T5", (), {"encodes": True, "name": "t5"})()).propose(TEXT, (2, 6), 1)
