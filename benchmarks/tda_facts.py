"""Which documents taught a language model where someone was born? Held against teaching it again without them.

The memory-free twin of the embedded `facts` model knows nobody's town. It is taught 235 new documents (139 state one
person's town each, which stands in 1, 2, 4, 8 or 16 of them; four for each person state the trade), and asked for each
of the 24 people to go on from "X was born in". Every form indexes the documents under the model that was taught.

*LDS*: taught again, from the twin, on random halves of the documents: Spearman's correlation, over halves, of a half's
summed scores with what teaching it made of the town's log-probability; mean over the people, 95 % interval over them.

*Leave-k-out*: for the first 12 people, taught again without the 16 documents that a form puts first, the same order
for all: by how many more nats the town's log-probability falls than without 16 drawn at random. ``all that state it``:
without the documents of that town, filled up at random.

Baselines that know no gradient: the words that a document shares with question and answer, or with the question alone,
the order of the documents, and dice.

    python -m benchmarks.tda_facts --json [--quick] [--work FOLDER]

A run that was stopped goes on: each teaching is kept in FOLDER.
"""

from __future__ import annotations

import copy
import hashlib
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.recording import arguments, publish
from benchmarks.tda_quality import FORMS
from benchmarks.trained_again import of_each, once, without
from whence.checks.lds import score
from whence.engine.progress import progress
from whence.engine.randomness import stream
from whence.influence.datainf import DataInf
from whence.influence.nearest import Nearest
from whence.influence.trak import TRAK
from whence.models.objectives import LanguageObjective
from whence.objective import Listed
from whence.score import Score
from whence.verbs import load_text
from whence.worlds.digits import halves
from whence.worlds.facts import corpus, twin_directory

KEY, BATCH, RATE, LEFT_OUT, SEEDS, ASKED = "tda_facts-1", 32, 2e-3, 16, 2, 12
TRADES = 4
"""Documents of each person that state the trade: what is alike, and taught something else."""
OTHERS: dict[str, Any] = {"trak": TRAK(), "datainf": DataInf(), "nearest, last layer": Nearest()}


def documents_of() -> tuple[Listed, dict[str, list[int]]]:
    """The documents, and the numbers of those that state a person's town."""
    texts: list[str] = []
    towns: dict[str, list[int]] = {person: [] for person in corpus.PEOPLE}
    trades: Counter[str] = Counter()
    for document in corpus.documents(KEY):
        relation, person, _ = document.facts[0]
        if relation == "trade":
            trades[person] += 1
            if trades[person] > TRADES:
                continue
        else:
            towns[person].append(len(texts))
        texts.append(document.text)
    return Listed(tuple(texts), tuple(texts)), towns


def taught(base: Any, documents: Listed, keep: np.ndarray, epochs: int, seed: int) -> Any:
    """The objective after ``epochs`` on what is kept. A document that is not keeps its place and costs nothing."""
    objective = copy.copy(base)
    objective.adapter = copy.copy(base.adapter)
    objective.adapter.model = copy.deepcopy(base.module).requires_grad_(True)
    optimiser = torch.optim.Adam(objective.module.parameters(), lr=RATE)
    order = np.stack([stream(KEY, "order", seed, e).permutation(len(keep)) for e in range(epochs)])
    batches = [own[i : i + BATCH] for own in order for i in range(0, len(keep), BATCH)]
    words = [len(objective.tokens(documents[i])[1]) for i in range(len(keep))]
    for step, pick in enumerate(batches):
        own = [int(i) for i in pick if keep[i]]
        if not own:
            continue
        loss = objective.losses([documents[i] for i in own]).values.sum() / sum(words[int(i)] for i in pick)
        optimiser.zero_grad()
        loss.backward()
        for group in optimiser.param_groups:
            group["lr"] = RATE * (1 - step / len(batches))
        optimiser.step()
    return objective


def outputs(
    base: Any, documents: Listed, kept: np.ndarray, epochs: int, seeds: int, work: Path, what: str
) -> np.ndarray:
    """Log-probabilities of the towns after teaching what is kept, mean over seeds: [teaching, person]."""
    people, found = questions(), np.zeros((len(kept), len(corpus.PEOPLE)))

    def losses(keep: np.ndarray, seed: int) -> np.ndarray:
        objective = taught(base, documents, keep, epochs, seed)
        with torch.no_grad():
            values: np.ndarray = objective.losses(people).values.numpy()
        return values

    with progress(what, total=len(kept) * seeds, unit="teachings") as advance:
        for j, keep in enumerate(kept):
            for seed in range(seeds):
                name = hashlib.sha256(repr((KEY, base.fingerprint(), epochs, seed)).encode())
                name.update(np.packbits(keep).tobytes())
                path = work / f"{name.hexdigest()[:32]}.npy"
                found[j] -= once(path, lambda keep=keep, seed=seed: losses(keep, seed)) / seeds
                advance(1)
    return found


def questions() -> list[tuple[str, str]]:
    return [(f"{person} was born in", f" {corpus.towns(KEY)[person]}.") for person in corpus.PEOPLE]


def without_gradients(documents: Listed) -> dict[str, np.ndarray]:
    """Scores of those who know no gradient, [person, document]."""

    def words(text: str) -> set[str]:
        return set(text.lower().replace(".", "").split())

    def shared(asked: list[str]) -> np.ndarray:
        held = [words(str(documents[i])) for i in range(len(documents))]
        return np.array([[len(words(q) & d) / len(d) for d in held] for q in asked])

    people = questions()
    dice = stream("tda_facts", "random").normal(size=(len(people), len(documents)))
    return {
        "words shared with question and answer": shared([p + t for p, t in people]),
        "words shared with the question": shared([p for p, _ in people]),
        "the first documents": np.tile(-np.arange(len(documents), dtype=float), (len(people), 1)),
        "random": dice,
    }


def left_out(base: Any, documents: Listed, towns: dict[str, list[int]], scores: dict[str, np.ndarray], people: int,
             epochs: int, work: Path) -> dict[str, np.ndarray]:  # fmt: skip
    """By how many more nats a town's log-probability falls without what a form puts first than without others."""
    n = len(documents)
    dice = stream("tda_facts", "left out")
    gone = {name: np.argsort(-own[:people], axis=1, kind="stable")[:, :LEFT_OUT] for name, own in scores.items()}
    rows = []
    for person in corpus.PEOPLE[:people]:
        stated = np.array(towns[person])
        rest = dice.permutation(np.setdiff1d(np.arange(n), stated))
        rows.append(np.concatenate([stated, rest])[:LEFT_OUT])
    gone["all that state it"] = np.stack(rows)
    gone["others"] = np.stack([dice.permutation(n)[:LEFT_OUT] for _ in range(people)])
    value = of_each(gone, outputs(base, documents, without(gone, n), epochs, 1, work, "teaching without them"))
    others = value.pop("others")
    return {name: others - own for name, own in value.items()}


def main() -> None:
    parser = arguments(str(__doc__))
    parser.add_argument("--quick", action="store_true", help="8 halves, 2 epochs, one form, two people")
    parser.add_argument("--halves", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "whence-tda-facts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    count, epochs, seeds, people = options.halves, options.epochs, SEEDS, ASKED
    if options.quick:
        count, epochs, seeds, people = 8, 2, 1, 2
    options.work.mkdir(parents=True, exist_ok=True)
    base = LanguageObjective(load_text(twin_directory()))
    documents, towns = documents_of()
    with torch.no_grad():
        before = -base.losses(questions()).values.numpy()
    whole = np.ones((1, len(documents)), bool)
    after = outputs(base, documents, whole, epochs, seeds, options.work, "teaching all")[0]
    kept = halves(len(documents), count, "facts")
    learned = outputs(base, documents, kept, epochs, seeds, options.work, "teaching halves")
    objective = taught(base, documents, whole[0], epochs, 0)
    # Its rows are told apart from those of the twin by their weights, which are no longer the directory's.
    objective.module.requires_grad_(True).eval()
    scores, rows = without_gradients(documents), {}
    told: dict[str, dict[str, Any]] = {name: {} for name in scores}
    forms = {"logra 16, int8": FORMS["logra 16, int8"]} if options.quick else FORMS | OTHERS
    with progress("forms", total=len(forms), unit="forms") as advance:
        for name, method in forms.items():
            began = time.perf_counter()
            fitted = method.fit(objective, documents)
            scores[name] = fitted.scores(questions())
            planes = getattr(getattr(fitted, "scheme", None), "planes", {})
            told[name] = {"seconds": round(time.perf_counter() - began, 1), "bytes per example": sum(planes.values())}
            advance(1, name)
    fall = left_out(base, documents, towns, scores, people, epochs, options.work)
    for name, own in scores.items():
        rows[name] = told[name] | {"lds": score(own, kept, learned).record()}
    for name, own in fall.items():
        rows.setdefault(name, {})["leave_k_out"] = Score.of("fall", "nats", own).record()
    known = {"before": Score.of("log-probability", "nats", before).record()}
    known["after"] = Score.of("log-probability", "nats", after).record()
    settings = {"halves": count, "seeds": seeds, "epochs": epochs, "rate": RATE, "left out": LEFT_OUT}
    publish("tda_facts", settings | {"town": known, "rows": rows}, options)


if __name__ == "__main__":
    main()
