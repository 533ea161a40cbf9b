"""ALTI-Logit: the source that a hand-made model copies, and the subject that decides a verb's number, come first."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import t as student

from whence.engine.decompose import LogitParts, decompose
from whence.engine.randomness import stream
from whence.errors import MethodError, WrongMapError
from whence.inputs.alti_logit import AltiLogit
from whence.models.residual import logit_parts, read
from whence.question import Metered
from whence.units import Units


class Prompt:
    """The next token after a text, its tokens the units but for the first; ``foil`` is what is held against it unless
    another one is asked for."""

    capabilities = frozenset({"text", "logit parts"})
    readout = "logit"

    def __init__(self, model: Any, ids: list[int], target: int, foil: int | None = None) -> None:
        self.model, self.ids, self.target, self.foil = model, ids, target, foil
        n = len(ids) - 1
        self.units = Units("token", tuple(f"t{i}" for i in range(n)), tuple(((i,),) for i in range(n)))

    def ask(self, keep: np.ndarray) -> np.ndarray:
        raise AssertionError("one look is enough")

    def logit_parts(self, foil: int | None = None) -> LogitParts:
        unit_of = [-1, *range(len(self.units))]
        held = self.foil if foil is None else foil
        return logit_parts(self.model, self.ids, len(self.ids) - 1, self.target, held, unit_of)


# --- a model made by hand: the marker takes up the cause, the last token copies it from the marker -------------------

CAUSES, DECOYS, FILLERS = [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]
MARKER, LAST, BEGIN = 11, 12, 13
NAMES = 11
IS_CAUSE, IS_MARKER, IS_LAST, IS_BEGIN = (2 * NAMES + NAMES + i for i in range(4))
WIDTH = 38


@cache
def copier() -> Any:
    """Two layers, one head each. Slots of the stream: a token's own name, the name taken up, the name to say; flags.
    Layer 1: the marker attends to the one token that is flagged as a cause and takes up its name. Layer 2: the last
    token attends to the marker and says the name that it took up. All else attends to the first token, which has no
    name. Decoys differ from causes by the flag alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=14, hidden_size=WIDTH, intermediate_size=4, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, attention_bias=True, rope_parameters={"rope_type": "default", "rope_theta": 1e30},
        max_position_embeddings=32, bos_token_id=BEGIN, eos_token_id=BEGIN,
    ))  # fmt: skip
    own, taken, said = (slice(i * NAMES, (i + 1) * NAMES) for i in range(3))
    slow = slice(WIDTH // 2 - 3, WIDTH // 2)  # channels that rotary positions hardly turn
    one, sink = slow.start, slow.start + 1
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(1.0 if "norm" in name else 0.0)
        table = model.model.embed_tokens.weight
        for token in range(14):
            if token < NAMES:
                table[token, token] = 1
            for flag, tokens in ((IS_CAUSE, CAUSES), (IS_MARKER, [MARKER]), (IS_LAST, [LAST]), (IS_BEGIN, [BEGIN])):
                table[token, flag] = float(token in tokens)
        for layer, (asks, has, reads, writes, gain) in enumerate(
            ((IS_MARKER, IS_CAUSE, own, taken, 2.0), (IS_LAST, IS_MARKER, taken, said, 2.0))
        ):
            at = model.model.layers[layer].self_attn
            at.q_proj.weight[one, asks] = at.k_proj.weight[one, has] = 8
            at.q_proj.bias[sink], at.k_proj.weight[sink, IS_BEGIN] = 8, 8
            at.v_proj.weight[:NAMES, reads] = torch.eye(NAMES)
            at.o_proj.weight[writes, :NAMES] = gain * torch.eye(NAMES)
        model.lm_head.weight[:NAMES, said] = torch.eye(NAMES)
    return model.eval()


def copying(seed: int) -> tuple[Prompt, int, int, int]:
    """A question to the copier, and the units of cause, decoy and marker."""
    rng = stream("test alti", seed)
    cause, decoy = int(rng.choice(CAUSES)), int(rng.choice(DECOYS))
    rest = [int(i) for i in rng.choice(FILLERS, 3)]
    pair = [cause, decoy] if rng.random() < 0.5 else [decoy, cause]
    body = [rest[0], pair[0], rest[1], pair[1], MARKER, rest[2]]
    question = Prompt(copier(), [BEGIN, *body, LAST], cause, decoy)
    return question, body.index(cause), body.index(decoy), 4


def test_the_copied_token_comes_first_though_it_was_read_from_another_position() -> None:
    for seed in range(12):
        question, cause, decoy, marker = copying(seed)
        with torch.no_grad():
            said = int(question.model(torch.tensor([question.ids])).logits[0, -1].argmax())
        assert said == question.target
        e = AltiLogit().explain(question)
        assert e.scores.argmax() == cause
        assert abs(e.scores[decoy]) < 0.02 * e.scores[cause]
        # Where its value was read from is the marker: the parts by position alone name the go-between.
        assert np.argmax(e.details["direct"]) == marker
        assert abs(e.details["direct"][cause]) < 0.02 * e.scores[cause]


def test_a_random_map_does_not_find_the_copied_token() -> None:
    found = [stream("dice", s).random(7).argmax() == copying(s)[1] for s in range(60)]
    assert np.mean(found) < 0.35


# --- a learned one: the subject's number decides the verb, another noun stands between or before ---------------------

NOUNS = 12
START, SINGULAR, PLURAL, THE, COMMA = 0, 1, 2, 3, 7
PREPOSITIONS, ADJECTIVES = range(4, 7), range(8, 14)
SEEDS = range(4)


def sentence(rng: np.random.Generator) -> tuple[list[int], int, int, int, bool]:
    """Tokens up to the verb, places of subject and distractor, the verb's number, whether the nouns disagree. Half of
    the sentences are "the key near the cabinets" + verb, half "near the cabinets , the key" + verb, so that neither the
    first nor the nearest noun is always the subject; adjectives come and go."""
    numbers = rng.integers(0, 2, 2)

    def phrase(noun: int, number: int) -> list[int]:
        adjective = [int(rng.choice(ADJECTIVES))] if rng.random() < 0.5 else []
        return [THE, *adjective, 14 + noun + NOUNS * number]

    one, two = (int(i) for i in rng.choice(NOUNS, 2, replace=False))
    subject, distractor = phrase(one, int(numbers[0])), phrase(two, int(numbers[1]))
    preposition, disagree = int(rng.choice(PREPOSITIONS)), bool(numbers[0] != numbers[1])
    if rng.random() < 0.5:
        ids = [START, *subject, preposition, *distractor]
        return ids, len(subject), len(ids) - 1, int(numbers[0]), disagree
    ids = [START, preposition, *distractor, COMMA, *subject]
    return ids, len(ids) - 1, 1 + len(distractor), int(numbers[0]), disagree


@cache
def grammarian(seed: int, steps: int = 120, rows: int = 64) -> Any:
    """A Llama of two layers, two heads to a value, taught to write the verb."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=14 + 2 * NOUNS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, bos_token_id=0,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.1,
            eos_token_id=0, attn_implementation="eager",
        ))  # fmt: skip
    rng, optimiser = stream("agreement", seed), torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98))
    for step in range(steps):
        batch = [sentence(rng) for _ in range(rows)]
        longest = max(len(s[0]) for s in batch)
        ids = torch.tensor([[*s[0], *[0] * (longest - len(s[0]))] for s in batch])
        states = model.model(input_ids=ids, use_cache=False).last_hidden_state
        last = states[torch.arange(rows), torch.tensor([len(s[0]) - 1 for s in batch])]
        verbs = torch.tensor([SINGULAR + s[3] for s in batch])
        loss = torch.nn.functional.cross_entropy(model.lm_head(last), verbs)
        for group in optimiser.param_groups:
            group["lr"] = 4e-3 * min(1.0, (step + 1) / 30) * (1 - step / steps)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def gradient_x_input(model: Any, ids: list[int], target: int, foil: int) -> np.ndarray:
    x = model.get_input_embeddings()(torch.tensor([ids])).detach().requires_grad_()
    logits = model(inputs_embeds=x).logits[0, -1]
    (slope,) = torch.autograd.grad(logits[target] - logits[foil], x)
    return np.asarray((slope * x)[0].sum(-1).detach().numpy())


@cache
def measured(seed: int, n: int = 60) -> dict[str, float]:
    """Share of fresh sentences, with the right verb, where the subject is before the distractor."""
    model, rng = grammarian(seed), stream("agreement, fresh", seed)
    drawn = [sentence(rng) for _ in range(n)]
    streams = read(model, [s[0] for s in drawn])
    won: dict[str, list[float]] = {}
    for (ids, subject, distractor, number, disagree), residual in zip(drawn, streams, strict=True):
        target, foil = SINGULAR + number, PLURAL - number
        parts = decompose(residual, [(len(ids) - 1, target, foil)])
        right = parts.total > 0
        won.setdefault("right verb", []).append(right)
        if not right:
            continue
        pulled, plain = parts.pulled(), gradient_x_input(model, ids, target, foil)
        maps = {
            "alti_logit": pulled,
            "gradient x input": plain,
            "its size": abs(plain),
            "random": rng.random(len(ids)),
            "nearest": np.arange(len(ids)),
            "first": -np.arange(len(ids)),
        }
        for name, m in maps.items():
            won.setdefault(name, []).append(m[subject] > m[distractor])
        kind = "nouns disagree" if disagree else "nouns agree"
        won.setdefault(kind, []).append(pulled[subject] > pulled[distractor])
        won.setdefault("leads all tokens", []).append(pulled.argmax() == subject)
        won.setdefault("share of MLPs", []).append(parts.mlp.sum() / parts.total)
    return {name: float(np.mean(values)) for name, values in won.items()}


def interval(values: list[float]) -> tuple[float, float]:
    """Of the mean over seeds, 95 %, by Student's t."""
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values) - half), float(np.mean(values) + half)


def test_the_subject_comes_before_the_distractor_more_often_than_by_gradient_x_input_place_or_chance() -> None:
    found = [measured(seed) for seed in SEEDS]
    assert min(f["right verb"] for f in found) > 0.95
    assert np.mean([f["alti_logit"] for f in found]) > 0.8
    for rival in ("gradient x input", "its size", "random", "nearest", "first"):
        gain = [f["alti_logit"] - f[rival] for f in found]
        assert interval(gain)[0] > 0, (rival, gain)
    # Where the distractor speaks for the other verb it is always behind.
    assert np.mean([f["nouns disagree"] for f in found]) > 0.95


def test_what_is_not_shown_the_subject_does_not_lead_all_tokens() -> None:
    """What the card's ``avoid`` says: most of the logit is the MLPs', and function words score too."""
    found = [measured(seed) for seed in SEEDS]
    assert np.mean([f["leads all tokens"] for f in found]) < 0.6
    assert np.mean([f["share of MLPs"] for f in found]) > 0.4


# --- invariances and shapes ------------------------------------------------------------------------------------------


def test_scores_and_what_belongs_to_no_unit_add_up_to_the_logit() -> None:
    ids, *_, number, _ = sentence(stream("test", 1))
    question = Prompt(grammarian(0), ids, SINGULAR + number, PLURAL - number)
    e = AltiLogit().explain(question)
    with torch.no_grad():
        own = question.model(torch.tensor([ids])).logits[0, -1]
    parts = e.scores.sum() + e.details["elsewhere"] + sum(e.details["mlp"]) + sum(e.details["bias"])
    assert parts == pytest.approx(float(own[question.target] - own[question.foil]), abs=1e-4)
    assert e.details["logit"] == pytest.approx(parts, abs=1e-4)
    assert e.axes == ("unit",)
    assert e.scores.shape == (len(ids) - 1,)


def test_target_and_foil_exchanged_turn_all_signs() -> None:
    ids, *_, number, _ = sentence(stream("test", 2))
    there = AltiLogit().explain(Prompt(grammarian(0), ids, SINGULAR + number, PLURAL - number))
    back = AltiLogit().explain(Prompt(grammarian(0), ids, PLURAL - number, SINGULAR + number))
    np.testing.assert_allclose(there.scores, -back.scores, atol=1e-5)
    named = AltiLogit(foil=THE).explain(Prompt(grammarian(0), ids, SINGULAR + number, PLURAL - number))
    assert abs(named.scores - there.scores).max() > 0.01


def test_one_forward_is_paid_for() -> None:
    metered = Metered(copying(0)[0])
    e = AltiLogit().explain(metered)
    assert metered.spent.forwards == e.cost.runs == AltiLogit().rows(7) == 1


def test_a_question_without_logit_parts_is_refused() -> None:
    question = copying(0)[0]
    question.capabilities = frozenset({"text"})
    with pytest.raises(MethodError, match="no logit parts"):
        AltiLogit().explain(question)


def test_units_that_do_not_fit_the_tokens_are_refused() -> None:
    class Another(Prompt):
        def logit_parts(self, foil: int | None = None) -> LogitParts:
            return copying(0)[0].logit_parts()

    with pytest.raises(WrongMapError, match="one number below 2"):
        AltiLogit().explain(Another(copier(), [BEGIN, 0, LAST], 0))
