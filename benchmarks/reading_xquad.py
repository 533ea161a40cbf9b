"""Answers with evidence over XQuAD (English: 165 paragraphs of 33 articles, 826 questions) and over the facts world.

*Retrieval*: does BM25 find the paragraph that a question was written for (hit@k)? Questions of one article are alike,
so that intervals are over articles. *Elsewhere*: how many answers stand in another paragraph as well: without that one
the evidence is still there. *Knock-out in the ranking* needs no reader: the gold paragraph alone is taken out (single),
or all paragraphs that hold the answer (joint), the next of the same ranking take their places; does what is read still
hold the answer? And would indexing again have changed what else is read?

*Readers*: no language model that reads prose is at hand, so that XQuAD is read by rules that have no memory, and
recited by a table that has nothing else (:mod:`benchmarks.extractive_reader`): the check must tell the two apart.
Questions whose evidence is gone, and foreign ones (asked of another article's paragraphs alone), are counted apart.

*Facts*: the embedded model, which knows towns of birth by heart, and its memory-free twin, on the same library. The
embedded model on XQuAD itself is counted as well: it does not read prose, and no more than that is said.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.extractive_reader import Extractive, Reciter, rarity
from benchmarks.recording import arguments, publish
from whence import verbs
from whence.answers import holds
from whence.checks.reader import KINDS, ReaderTrial, reader
from whence.engine.progress import Advance, progress
from whence.engine.randomness import stream
from whence.engine.retrieval import BM25
from whence.models.reading import read
from whence.reading import Asked, Passage, Reading
from whence.score import Score
from whence.worlds.facts import twin_directory
from whence.worlds.facts.library import library

KS = (1, 3, 5, 10)
TOP_K = 5
VALUES = 6


class Quad:
    """Paragraphs, questions, and the article of each question."""

    def __init__(self, path: Path) -> None:
        self.passages: list[Passage] = []
        self.asked: list[Asked] = []
        self.article: list[int] = []
        self.paragraphs_of: list[tuple[int, ...]] = []
        with gzip.open(path, "rt", encoding="utf8") as lines:
            for number, line in enumerate(lines):
                row = json.loads(line)
                own = []
                for i, p in enumerate(row["paragraphs"]):
                    gold = len(self.passages)
                    own.append(gold)
                    self.passages.append(Passage(p["context"], f"{row['title']}, paragraph {i + 1}"))
                    for q in p["qas"]:
                        self.asked.append(Asked(q["question"], q["answers"][0]["text"], (), (gold,)))
                        self.article.append(number)
                self.paragraphs_of.append(tuple(own))


def shape(text: str) -> tuple[str, int]:
    """What kind of thing an answer is, as far as it shows: number, name or other words; and how many words."""
    words = text.split()
    kind = "number" if any(c.isdigit() for c in text) else "name" if text[:1].isupper() else "words"
    return kind, min(len(words), 4)


def alike(quad: Quad, i: int, rng: np.random.Generator) -> tuple[str, ...]:
    """Answers of the same shape from other articles."""
    own = quad.asked[i].answer
    pool = {a.answer for a, n in zip(quad.asked, quad.article, strict=True)
            if n != quad.article[i] and shape(a.answer) == shape(own)}  # fmt: skip
    pool = {v for v in pool if not holds(v, own) and not holds(own, v)}
    return tuple(rng.permutation(sorted(pool))[:VALUES].tolist())


def by_article(values: Sequence[float], article: Sequence[int], name: str) -> dict[str, Any]:
    """Mean over questions, and the interval of the mean over articles."""
    v, a = np.array(values, float), np.array(article)
    means = [v[a == n].mean() for n in sorted(set(article))]
    score = Score.of(name, "share of questions", means)
    ends = [round(min(max(x, 0.0), 1.0), 4) for x in score.interval]
    apart = {"mean": round(score.mean, 4), "interval": ends, "n": len(means)}
    return {"mean": round(float(v.mean()), 4), "of articles": apart, "questions": len(v)}


def wilson(k: int, n: int) -> list[float] | None:
    """95 % interval of a share of ``n`` that are asked apart from each other."""
    if not n:
        return None
    z = 1.96
    p, half = (k + z * z / 2) / (n + z * z), z / (n + z * z) * np.sqrt(k * (n - k) / n + z * z / 4)
    return [round(max(0.0, float(p - half)), 4), round(min(1.0, float(p + half)), 4)]


def retrieval(quad: Quad, index: BM25, advance: Advance) -> dict[str, Any]:
    """hit@k, answers that stand elsewhere, and what knocking out leaves to read."""
    n = len(quad.asked)
    hits: dict[int, list[float]] = {k: [] for k in KS}
    plain, words, near, single, joint, moved = ([] for _ in range(6))
    # One index without each paragraph that is gold: only to show what indexing again would do.
    less = {
        g: BM25([p for i, p in enumerate(quad.passages) if i != g]) for g in sorted({a.gold[0] for a in quad.asked})
    }
    for a in quad.asked:
        (gold,) = a.gold
        ranking = index.rank(a.question)
        best = ranking.best(max(KS))
        for k in KS:
            hits[k].append(float(gold in best[:k]))
        holding = {i for i, p in enumerate(quad.passages) if holds(p.text, a.answer)}
        plain.append(float(any(a.answer in p.text for i, p in enumerate(quad.passages) if i != gold)))
        words.append(float(bool(holding - {gold})))
        near.append(float(bool((holding - {gold}) & set(best[:TOP_K]))))
        single.append(float(bool(holding & set(ranking.best(TOP_K, {gold})))))
        joint.append(float(bool(holding & set(ranking.best(TOP_K, holding | {gold})))))
        again = less[gold].rank(a.question).best(TOP_K)
        moved.append(float(tuple(i + (i >= gold) for i in again) != ranking.best(TOP_K, {gold})))
        advance()
    about = {
        **{f"hit@{k}": v for k, v in hits.items()},
        "answer stands in another paragraph, as it is written": plain,
        "answer stands in another paragraph, as words": words,
        f"... and in one of the best {TOP_K}": near,
        f"best {TOP_K} still hold the answer without the gold paragraph (single)": single,
        f"best {TOP_K} still hold the answer without all that hold it (joint)": joint,
        f"best {TOP_K} others change where the index is made again": moved,
    }
    return {"questions": n, "paragraphs": len(quad.passages),
            **{name: by_article(v, quad.article, name) for name, v in about.items()}}  # fmt: skip


def counted(trial: ReaderTrial) -> dict[str, Any]:
    """Counts by kind with intervals, and joint against single among the answers that went on trial."""
    kinds = {}
    for kind in KINDS:
        found = trial.counts(kind)
        n = sum(found.values())
        if n:
            kinds[kind] = {"n": n} | {
                w: {"n": k, "share": round(k / n, 4), "interval": wilson(k, n)} for w, k in found.items()
            }
    tried = [r for r in trial.rows if r.follows is not None]
    out: dict[str, Any] = {"kinds": kinds, "verdict": trial.verdict.record()}
    for name in ("joint", "single"):
        said = [getattr(r, name) for r in tried]
        out[f"{name} knock-out"] = {w: said.count(w) for w in ("stays", "abstains", "changes")}
    return out


def on_prose(quad: Quad, model: Any, index: BM25, numbers: Sequence[int], advance: Advance) -> dict[str, Any]:
    """A reader on trial: the questions answered, gone, and foreign (over the next article's paragraphs alone)."""
    articles = len(quad.paragraphs_of)
    foreign = [BM25([quad.passages[i] for i in own]) for own in quad.paragraphs_of]
    article_of: dict[str, int] = {}
    asked: list[Asked] = []
    left_out = 0
    for i in numbers:
        a, rng = quad.asked[i], stream("reading xquad", i)
        values = alike(quad, i, rng)
        if len(values) < VALUES or holds(a.question, a.answer):
            left_out += 1
            advance(3)
            continue
        for kind in ("answered", "gone"):
            asked.append(Asked(a.question, a.answer, values, a.gold, kind))
        asked.append(Asked(a.question, a.answer, values, (), "foreign"))
        article_of[a.question] = (quad.article[i] + 1) % articles

    def own(question: str) -> Reading:
        return read(model, question, retriever=index, top_k=TOP_K)

    def others(question: str) -> Reading:
        return read(model, question, retriever=foreign[article_of[question]], top_k=TOP_K)

    at_home = reader(own, [a for a in asked if a.kind != "foreign"], advance=advance)
    abroad = reader(others, [a for a in asked if a.kind == "foreign"], advance=advance)
    found = counted(ReaderTrial(at_home.verdict, at_home.rows + abroad.rows))
    return {"left out (too few values of the same shape, or the question says the answer)": left_out, **found}


def on_facts(model: Any, libraries: int, advance: Advance) -> dict[str, Any]:
    """A language model over libraries of the facts world."""
    trials = []
    for i in range(libraries):
        notes = library("benchmark", i)
        index = BM25(notes.passages)

        def ask(question: str, index: BM25 = index) -> Reading:
            return read(model, question, retriever=index, top_k=3, max_tokens=14)

        trials.append(reader(ask, notes.asked, advance=advance))
    # The people are the same in each library: the first one's verdict, all rows.
    return counted(ReaderTrial(trials[0].verdict, tuple(r for t in trials for r in t.rows)))


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("WHENCE_DATA", "../shared/data")))
    parser.add_argument("--questions", type=int, default=826, help="questions for the readers")
    parser.add_argument("--libraries", type=int, default=2, help="libraries of the facts world")
    parser.add_argument("--prose", type=int, default=30, help="questions that the embedded model is asked")
    options = parser.parse_args()
    quad = Quad(options.data / "xquad-en" / "articles.jsonl.gz")
    index = BM25(quad.passages)
    order = stream("reading xquad", "order").permutation(len(quad.asked)).tolist()
    chosen = sorted(order[: options.questions])
    facts, twin = verbs.load_text("facts"), verbs.load_text(twin_directory())
    total = len(quad.asked) + 2 * 3 * len(chosen) + 2 * 36 * options.libraries + options.prose
    with progress("reading", total=total, unit="questions") as advance:
        found = retrieval(quad, index, advance)
        extractive = on_prose(quad, Extractive(rarity([p.text for p in quad.passages])), index, chosen, advance)
        by_heart = {quad.asked[i].question: quad.asked[i].answer for i in chosen}
        recited = on_prose(quad, Reciter(by_heart), index, chosen, advance)
        worlds = {"embedded model": on_facts(facts, options.libraries, advance),
                  "memory-free twin": on_facts(twin, options.libraries, advance)}  # fmt: skip
        right = 0
        for i in order[: options.prose]:
            a = quad.asked[i]
            right += holds(read(facts, a.question, retriever=index, top_k=1, max_tokens=24).text, a.answer)
            advance()
    publish(
        "reading_xquad",
        {
            "retrieval": found,
            "readers of prose": {"extractive rules": extractive, "reciter": recited},
            "facts": {"models": {"embedded": facts.fingerprint, "twin": twin.fingerprint}, **worlds},
            "embedded model on prose": {
                "right": right, "n": options.prose, "interval": wilson(right, options.prose),
                "note": "not shown: it was never taught to read prose, and no trial of its answers is meant here",
            },
        },
        options,
    )  # fmt: skip


if __name__ == "__main__":
    main()
