"""Which method finds the sentence that an answer was read from, and the word that licensed another? Truth is known.

Scenes of the facts world, questions that the embedded model itself answers right; units are sentences, the target is
the answer's value. By trade: the question shares no word with any sentence. By name: it does, and lexical overlap finds
it. Grammar: units are the words before the verb or the last name; the licensing word is the planted one, the target is
what it licenses. BLiMP: sentences of nine paradigms whose licensing word is marked, of which the model finds the right
word likelier than the wrong one; what is explained is the difference of the two log-probabilities. ``likelier`` is the
share of which it does (a coin has .5): where that is near .5 the model has no licensing word to be found. Baselines
never ask the model (position, recency, overlap, random) or read its attention alone.

hit@1: the planted unit has the highest score (a tie counts its share). MRR: mean of 1/rank, ties at their mean rank.
LDS: rank correlation of the fall that scores predict and the real one over 32 random sets of units that no method saw.
Drop: fall of the log-probability without the unit of the highest score, minus that without a random one.
"""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.recording import arguments, publish
from whence import verbs
from whence.engine.progress import progress
from whence.engine.randomness import stream
from whence.errors import WhenceError
from whence.method import load
from whence.score import Score
from whence.segments import Segment, Segments
from whence.text import TextSettings
from whence.worlds.facts.corpus import agreement, indirect_object, scene

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "leave_one_out": ("leave_one_out", {}),
    "context_cite": ("context_cite", {}),
    "mexgen, C-LIME": ("mexgen", {"estimator": "clime"}),
    "mexgen, L-SHAP": ("mexgen", {"estimator": "lshap"}),
    "textgen_shap": ("textgen_shap", {}),
    "atman, multiply": ("atman", {}),
    "atman, bias": ("atman", {"how": "bias"}),
    "alti_logit": ("alti_logit", {}),
    "integrated_gradients": ("integrated_gradients", {}),
    "input_x_gradient": ("input_x_gradient", {}),
    "saliency": ("saliency", {}),
    "attention (baseline)": ("attention_mass", {}),
}


def asked(model: Any, kind: str, n: int, seed: int) -> Iterator[tuple[Any, int, str]]:
    """(question, planted unit, what is asked) of ``n`` prompts that the model answers right."""
    found = tried = 0
    while found < n and tried < 20 * n:
        rng = stream("text truth", kind, seed, tried)
        tried += 1
        if kind in ("by trade", "by name"):
            drawn = scene(rng, 6, by_trade=float(kind == "by trade"), hops=False)
            about = [a for a in drawn.asked if a.relation in ("place", "thing") and a.by_trade == (kind == "by trade")]
            about = [a for a in about if not drawn.sentences[a.causes[0]].called.startswith("the")]
            if not about:
                continue
            a, text, parts = about[0], "", []
            for s in drawn.sentences:
                parts.append(Segment("sentence", len(text), len(text) + len(s.text)))
                text += s.text + " "
            prompt, value, cause = f"{text.rstrip()}\nQuestion: {a.question}\nAnswer: {a.lead}", a.value, a.causes[0]
            words = a.question
        else:
            licensed = agreement(rng) if kind == "agreement" else indirect_object(rng)
            prompt, value, words = licensed.prefix, licensed.target, ""
            at, parts = 0, []
            for w in prompt.split(" "):
                if w not in ("The", "the"):
                    parts.append(Segment("word", at, at + len(w)))
                at += len(w) + 1
            cause = next(i for i, p in enumerate(parts) if p.start == licensed.start)
        wrote = model.write(TextSettings(prompt, max_tokens=1))
        if wrote.text.strip() != value:
            continue
        found += 1
        run = model.write(TextSettings(prompt, forced=f" {value}"))
        yield model.question(run, Segments(prompt, tuple(parts)), level=parts[0].level), cause, words


class Contrast:
    """The log-probability of the right word minus that of the wrong one."""

    def __init__(self, right: Any, wrong: Any) -> None:
        self.right, self.wrong, self.units = right, wrong, right.units

    def ask(self, keep: NDArray[np.bool_]) -> NDArray[np.float64]:
        return np.asarray(self.right.ask(keep) - self.wrong.ask(keep))


def paradigms(model: Any, data: Path, n: int, seed: int, told: dict[str, Any]) -> Iterator[tuple[Any, int, str]]:
    """(contrast, licensing word, "") of ``n`` sentences of which the model finds the right word likelier."""
    path = data / "blimp-ioi-targets" / "licensed_word.jsonl.gz"
    if not path.is_file():
        told["skipped"] = f"no {path.name}: set WHENCE_DATA to the folder of the project's data"
        return
    with gzip.open(path, "rt", encoding="utf8") as lines:
        rows = [json.loads(line) for line in lines]
    by_paradigm: dict[str, list[bool]] = {}
    found = 0
    for i in stream("text truth", "BLiMP", seed).permutation(len(rows)):
        row = rows[i]
        prompt, words = row["prefix"], row["prefix"].split(" ")
        if words.count(row["target"]) != 1 or len(words) < 3:
            continue
        at, parts = 0, []
        for w in words:
            parts.append(Segment("word", at, at + len(w)))
            at += len(w) + 1
        sides = []
        for word in (row["word_good"], row["word_bad"]):
            run = model.write(TextSettings(prompt, forced=f" {word}"))
            sides.append((run, float(run.logprobs.sum())))
        right = sides[0][1] > sides[1][1]
        by_paradigm.setdefault(row["UID"], []).append(right)
        if right:
            found += 1
            good, bad = (model.question(run, Segments(prompt, tuple(parts)), level="word") for run, _ in sides)
            yield Contrast(good, bad), words.index(row["target"]), ""
        if found == n:
            break
    everything = [right for v in by_paradigm.values() for right in v]
    told["likelier"] = {
        k: [round(float(np.mean(v)), 3), len(v)] for k, v in [*by_paradigm.items(), ("all", everything)]
    }


def totals(question: Any, method: str, settings: dict[str, Any]) -> NDArray[np.float64]:
    """The scores of a method that asks a question which remembers nothing of what others asked."""
    if isinstance(question, Contrast):
        return totals(question.right, method, settings) - totals(question.wrong, method, settings)
    fresh = question.adapter.question(question.run, question.segments, numbers=question.numbers)
    return np.asarray(load(method)(**settings).explain(fresh).totals, float)


def guesses(question: Any, words: str, rng: np.random.Generator) -> dict[str, NDArray[np.float64]]:
    """Scores that never ask the model."""
    n = len(question.units)
    said = set(words.rstrip("?").split())
    overlap = [len(said & set(u.rstrip(".").split())) for u in question.units.names]
    return {
        "first (baseline)": -np.arange(n, dtype=float),
        "last (baseline)": np.arange(n, dtype=float),
        "overlap (baseline)": np.array(overlap, float),
        "random (baseline)": rng.random(n),
    }


def place(scores: NDArray[np.float64], cause: int) -> tuple[float, float]:
    """(hit@1, reciprocal rank) of the planted unit."""
    above, same = int((scores > scores[cause]).sum()), int((scores == scores[cause]).sum())
    return (1 / same if not above else 0.0), 1 / (above + (same + 1) / 2)


def tried(
    question: Any, cause: int, scores: NDArray[np.float64], held: tuple[NDArray[np.bool_], NDArray[np.float64]]
) -> dict[str, float]:
    """All numbers of one answer."""
    from scipy.stats import spearmanr

    n = len(scores)
    keep, real = held
    whole = float(question.ask(np.ones((1, n), bool))[0])
    hit, reciprocal = place(scores, cause)
    predicted = (~keep * scores).sum(1)
    varies = len(set(predicted.round(12))) > 1
    alone = whole - question.ask(~np.eye(n, dtype=bool))
    return {
        "hit@1": hit,
        "MRR": reciprocal,
        "LDS": float(spearmanr(predicted, whole - real).statistic) if varies else 0.0,
        "drop": float(alone[int(np.argmax(scores))] - alone.mean()),
    }


def measure(
    kind: str, prompts: Iterator[tuple[Any, int, str]], seed: int, advance: Callable[..., None]
) -> dict[str, Any]:
    """Rows of all methods and baselines on one kind of prompts."""
    values: dict[str, dict[str, list[float]]] = {}
    failed: dict[str, str] = {}
    seconds: dict[str, list[float]] = {}
    for number, (question, cause, words) in enumerate(prompts):
        rng = stream("text truth", kind, seed, number, "held")
        keep = rng.random((32, len(question.units))) < 0.5
        held = keep, question.ask(keep)
        answers = guesses(question, words, rng)
        for name, (method, settings) in METHODS.items():
            began = time.process_time()
            try:
                answers[name] = totals(question, method, settings)
            except WhenceError as error:
                failed[name] = str(error.found)
                continue
            seconds.setdefault(name, []).append(time.process_time() - began)
        for name, scores in answers.items():
            for metric, value in tried(question, cause, scores, held).items():
                values.setdefault(name, {}).setdefault(metric, []).append(value)
        advance(1, kind)
    rows = {
        name: {m: Score.of(m, "", v).record() for m, v in metrics.items()}
        | ({"seconds": round(float(np.mean(seconds[name])), 3)} if name in seconds else {})
        for name, metrics in values.items()
    }
    return {"n": len(next(iter(values.values()))["hit@1"]) if values else 0, "rows": rows, "failed": failed}


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--prompts", type=int, default=60, help="prompts of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("WHENCE_DATA", "../shared/data")))
    options = parser.parse_args()
    model = verbs.load_text("facts")
    kinds = ("by trade", "by name", "agreement", "indirect object")
    told: dict[str, Any] = {}
    with progress("text truth", total=options.prompts * (len(kinds) + 1), unit="prompts") as advance:
        n, seed = options.prompts, options.seed
        found = {kind: measure(kind, asked(model, kind, n, seed), seed, advance) for kind in kinds}
        found["BLiMP"] = measure("BLiMP", paradigms(model, options.data, n, seed, told), seed, advance) | told
    hits = {
        name: row["hit@1"]["mean"] for name, row in found["by trade"]["rows"].items() if "baseline" not in name
    }  # fmt: skip
    publish(
        "text_truth",
        {
            "model": {"name": model.name, "fingerprint": model.fingerprint},
            "target": "two methods or more at hit@1 of .95 on facts in the context that the model answers right",
            "methods at .95, by trade": sorted(n for n, h in hits.items() if h >= 0.95),
            "kinds": found,
        },
        options,
    )


if __name__ == "__main__":
    main()
