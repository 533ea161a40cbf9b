"""Which form of a training index agrees with training again, at how many bytes per example?

*digits*: the world of that name, a small net on 1,000 of scikit-learn's digits. Linear datamodelling score (LDS):
over 100 random halves of the data, each trained on with 2 seeds, Spearman's correlation of the summed scores of a
half with what training on it made of the right class's log-odds; mean over 100 queries, 95 % interval over queries.
Beside it what each form loses to LoGRA of 16 x 16 and of 32 x 32, query by query, and how many times fewer bytes it
takes than these in float32, as published tools keep them. Leave-k-out: for 40 queries the net is trained again, with
2 seeds, without the 50 examples that a form puts first: the fall of the right class's log-odds, less that without 50
drawn at random.

*facts*: the embedded language model's 427 documents. For each of 24 people, "Where was X born?" is asked: R-precision
and hit@1 of the documents that state the town, and how often these score above documents that name the same person for
another fact (chance .5). BM25-like overlap of the question with the documents is the baseline.

    python -m benchmarks.tda_quality --json [--quick]
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np

from benchmarks.recording import RESULTS, arguments, publish
from benchmarks.trained_again import of_each, without
from whence.checks.lds import correlations, score
from whence.engine.progress import progress
from whence.engine.randomness import stream
from whence.influence.datainf import DataInf
from whence.influence.ekfac import EKFAC
from whence.influence.eogp import EOGP
from whence.influence.grad_dot import GradDot
from whence.influence.logra import LoGRA
from whence.influence.lorif import LoRIF
from whence.influence.nearest import Nearest
from whence.influence.sketch import Sketch
from whence.influence.trak import TRAK
from whence.models.objectives import LanguageObjective
from whence.score import Score
from whence.verbs import load_text
from whence.worlds.digits import digits as world
from whence.worlds.facts import corpus
from whence.worlds.facts.training_set import asked, stating, training_set

QUERIES = 100
FORMS: dict[str, Any] = {
    "grad_dot": GradDot(),
    "logra 16, int8": LoGRA(),
    "logra 16, float16": LoGRA(keep="float16"),
    "logra 16, random projection": LoGRA(init="random"),
    "logra 32, int8": LoGRA(size=32),
    "lorif 32, rank 1": LoRIF(),
    "lorif 32, rank 4": LoRIF(rank=4),
    "eogp 256 bits": EOGP(bits=256),
    "eogp 1024 bits": EOGP(bits=1024),
    "eogp 4096 bits": EOGP(bits=4096),
    "sketch 256 bits": Sketch(256),
    "sketch 1024 bits": Sketch(1024),
    "sketch 2048 bits": Sketch(),
    "sketch 2048, int8": Sketch(keep="int8"),
    "sketch 8192, int8": Sketch(8192, "int8"),
    "ekfac": EKFAC(),
}
OF_DIGITS: dict[str, Any] = {"trak": TRAK(), "datainf": DataInf(), "nearest, last layer": Nearest()}
"""What is too large for `facts` as it is meant, or not meant for it. TracIn at one checkpoint is grad_dot."""
LOGRA = ("logra 16, float16", "logra 32, int8")
"""What forms are held against: the kind of their numbers costs no LDS that could be seen."""
LEFT_OUT, ASKED = 50, 40


def digits(halves: int, seeds: int) -> dict[str, Any]:
    """LDS and leave-k-out of every form, of cosine similarity of the pictures, and of scores drawn at random."""
    own = world(queries=QUERIES)
    truth = own.truth(halves, seeds)

    told: dict[str, np.ndarray] = {}

    def lds(scores: np.ndarray) -> dict[str, Any]:
        return score(scores, truth.subsets, truth.mean).record()

    objective = own.objective()
    found: dict[str, Any] = {}
    forms = FORMS | OF_DIGITS
    with progress("digits", total=len(forms), unit="forms") as advance:
        for name, method in forms.items():
            began = time.perf_counter()
            fitted = method.fit(objective, own.examples)
            built = time.perf_counter() - began
            scores = fitted.scores(own.queries)
            told[name] = scores
            found[name] = {"lds": lds(scores), "seconds_to_build": round(built, 2), **_bytes(fitted)}
            advance(1, name)
    ink, asked_ink = own.x + 1, own.query_x + 1  # 0 where there is none
    unit, asked_unit = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (ink, asked_ink))
    told["cosine similarity of pictures"] = asked_unit @ unit.T
    told["random"] = stream("tda_quality", "random").normal(size=(QUERIES, len(own)))
    for name in ("cosine similarity of pictures", "random"):
        found[name] = {"lds": lds(told[name])}
    each = {name: correlations(scores, truth.subsets, truth.mean) for name, scores in told.items()}
    kept = {name: list(FORMS[name].fit(objective, own.examples).bank.shapes.values()) for name in LOGRA}
    for name, gone in left_out(own, told, seeds).items():
        found[name]["leave_k_out"] = gone
        for logra in LOGRA:
            if name == logra:
                continue
            row = {"lds": Score.of("LDS", "Spearman", each[name] - each[logra]).record()}
            if "bytes_per_example" in found[name]:
                numbers = sum(out * into for out, into in kept[logra])
                row["smaller_than_float32"] = round(4 * numbers / found[name]["bytes_per_example"], 1)
            found[name][f"against {logra}"] = row
    return found


def left_out(own: Any, told: dict[str, np.ndarray], seeds: int) -> dict[str, dict[str, Any]]:
    """By how much more the right class's log-odds fall without what a form puts first than without others, query by
    query."""
    n = len(own)
    dice = stream("tda_quality", "left out")
    gone = {name: np.argsort(-scores[:ASKED], axis=1)[:, :LEFT_OUT] for name, scores in told.items()}
    gone["others"] = np.stack([dice.permutation(n)[:LEFT_OUT] for _ in range(ASKED)])
    value = of_each(gone, own.retrained(without(gone, n), range(seeds)).mean(0))
    others = value.pop("others")
    return {name: Score.of("fall", "log-odds", others - own).record() for name, own in value.items()}


def _bytes(fitted: Any) -> dict[str, int]:
    planes = getattr(getattr(fitted, "scheme", None), "planes", None)
    return {"bytes_per_example": sum(planes.values())} if planes else {}


def facts(people: int) -> dict[str, Any]:
    """Documents that state a town of birth, found for the question about it."""
    objective, examples = LanguageObjective(load_text()), training_set()
    names = list(corpus.PEOPLE)[:people]
    queries = [asked(p) for p in names]
    stated = [np.array(stating("town", p)) for p in names]
    others = [np.array(stating("trade", p)) for p in names]

    def judge(scores: np.ndarray) -> dict[str, Any]:
        precision, first, above = [], [], []
        for q, own in enumerate(stated):
            order = np.argsort(-scores[q], kind="stable")
            precision.append(np.isin(order[: len(own)], own).mean())
            first.append(float(order[0] in own))
            a, b = scores[q][own][:, None], scores[q][others[q]][None]
            above.append(((a > b) + 0.5 * (a == b)).mean())
        named = {"r_precision": precision, "hit_at_1": first, "above_same_person": above}
        return {k: Score.of(k, "share", v).record() for k, v in named.items()}

    found: dict[str, Any] = {}
    with progress("facts", total=len(FORMS), unit="forms") as advance:
        for name, method in FORMS.items():
            fitted = method.fit(objective, examples)
            found[name] = judge(fitted.scores(queries)) | _bytes(fitted)
            advance(1, name)
    words = [set(str(examples[i]).lower().replace(".", "").split()) for i in range(len(examples))]
    question = [set((p + t).lower().replace(".", "").split()) for p, t in queries]
    found["overlap with question and answer"] = judge(
        np.array([[len(q & w) / len(w) for w in words] for q in question])
    )
    ask = [set(p.lower().replace("?", "").split()) for p, _ in queries]
    found["overlap with the question alone"] = judge(np.array([[len(q & w) / len(w) for w in words] for q in ask]))
    found["random"] = judge(stream("tda_quality", "facts").normal(size=(len(names), len(examples))))
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer halves and people")
    parser.add_argument("--digits", action="store_true", help="digits alone; what is kept of facts stays")
    asked_for = parser.parse_args()
    halves, seeds, people = (40, 1, 8) if asked_for.quick else (100, 2, len(corpus.PEOPLE))
    result = {"digits": digits(halves, seeds), "halves": halves, "seeds": seeds}
    kept = RESULTS / "tda_quality.json"
    if not asked_for.digits:
        result["facts"] = facts(people)
    elif asked_for.write and kept.exists():
        result["facts"] = json.loads(kept.read_text())["facts"]
    publish("tda_quality", result, asked_for)


if __name__ == "__main__":
    main()
