"""Which form of a training index agrees with training again, at how many bytes per example?

*digits*: a small net on 1,000 of scikit-learn's digits. Linear datamodelling score (LDS): over 100 random halves of the
data, each trained on with 2 seeds, Spearman's correlation of the summed scores of a half with what training on it made
of the loss; mean over 100 queries, 95 % interval over queries.

*facts*: the embedded language model's 427 documents. For each of 24 people, "Where was X born?" is asked: R-precision
and hit@1 of the documents that state the town, and how often these score above documents that name the same person for
another fact (chance .5). BM25-like overlap of the question with the documents is the baseline.

    python -m benchmarks.tda_quality --json [--quick]
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import nn

from benchmarks.recording import arguments, publish
from whence.engine.progress import progress
from whence.engine.randomness import stream, torch_stream
from whence.influence.ekfac import EKFAC
from whence.influence.eogp import EOGP
from whence.influence.grad_dot import GradDot
from whence.influence.logra import LoGRA
from whence.influence.lorif import LoRIF
from whence.models.objectives import ClassifierObjective, LanguageObjective
from whence.objective import Listed
from whence.score import Score
from whence.verbs import load_text
from whence.worlds.facts import corpus
from whence.worlds.facts.training_set import asked, stating, training_set

N, QUERIES, WIDTH, STEPS = 1_000, 100, 32, 300
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
    "ekfac": EKFAC(),
}


class Digits:
    """Digits, and nets trained on any part of them, many side by side."""

    def __init__(self) -> None:
        x, y = load_digits(return_X_y=True)
        order = stream("tda_quality").permutation(len(x))
        x, y = (x[order] / 16).astype(np.float32), y[order]
        self.x, self.y = torch.from_numpy(x), torch.from_numpy(y)
        self.examples = Listed(tuple((a, int(b)) for a, b in zip(x[:N], y[:N], strict=True)), tuple(map(str, y[:N])))
        stop = N + QUERIES
        self.queries = [(a, int(b)) for a, b in zip(x[N:stop], y[N:stop], strict=True)]

    def train(self, kept: torch.Tensor, seeds: list[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Weights of nets trained on kept[net, example], and loss[net, query]. All see batches in one order."""

        def first(shape: tuple[int, int], name: str) -> torch.Tensor:
            drawn = [torch.randn(shape, generator=torch_stream("tda_quality", name, s)) * 0.15 for s in seeds]
            return torch.stack(drawn).requires_grad_()

        weights = [first((64, WIDTH), "in"), torch.zeros(len(seeds), 1, WIDTH, requires_grad=True)]
        weights += [first((WIDTH, 10), "out"), torch.zeros(len(seeds), 1, 10, requires_grad=True)]
        optimiser = torch.optim.SGD(weights, lr=0.4, momentum=0.9, weight_decay=1e-3)
        g = torch_stream("tda_quality", "batches")
        for step in range(STEPS):
            pick = torch.randint(0, N, (100,), generator=g)
            share = kept[:, pick]
            loss = (self._losses(weights, self.x[pick], self.y[pick]) * share).sum(1) / share.sum(1).clamp_min(1)
            optimiser.zero_grad()
            loss.sum().backward()
            for group in optimiser.param_groups:
                group["lr"] = 0.4 * (1 - step / STEPS)
            optimiser.step()
        with torch.no_grad():
            stop = N + QUERIES
            return [w.detach() for w in weights], self._losses(weights, self.x[N:stop], self.y[N:stop])

    @staticmethod
    def _losses(w: list[torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits = torch.relu(x @ w[0] + w[1]) @ w[2] + w[3]
        nets = len(logits)
        flat = nn.functional.cross_entropy(logits.flatten(0, 1), y.repeat(nets), reduction="none")
        return flat.view(nets, -1)

    def objective(self) -> ClassifierObjective:
        """The net trained on everything."""
        weights, _ = self.train(torch.ones(1, N), [0])
        net = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
        with torch.no_grad():
            for layer, w, b in ((net[0], weights[0], weights[1]), (net[2], weights[2], weights[3])):
                layer.weight.copy_(w[0].T)
                layer.bias.copy_(b[0, 0])
        return ClassifierObjective(net, "digits")


def digits(halves: int, seeds: int) -> dict[str, Any]:
    """LDS of every form, of cosine similarity of the pictures, and of scores drawn at random."""
    world = Digits()
    g = torch_stream("tda_quality", "halves")
    kept = torch.stack([(torch.randperm(N, generator=g) < N // 2).float() for _ in range(halves)])
    _, losses = world.train(kept.repeat(seeds, 1), [s for s in range(seeds) for _ in range(halves)])
    outcome = -losses.view(seeds, halves, -1).mean(0).numpy()

    def lds(scores: np.ndarray) -> dict[str, Any]:
        predicted = scores @ kept.numpy().T
        values = [spearmanr(predicted[q], outcome[:, q]).statistic for q in range(QUERIES)]
        return Score.of("LDS", "Spearman", np.nan_to_num(values)).record()

    objective = world.objective()
    found: dict[str, Any] = {}
    with progress("digits", total=len(FORMS), unit="forms") as advance:
        for name, method in FORMS.items():
            began = time.perf_counter()
            fitted = method.fit(objective, world.examples)
            built = time.perf_counter() - began
            scores = fitted.scores(world.queries)
            found[name] = {"lds": lds(scores), "seconds_to_build": round(built, 2), **_bytes(fitted)}
            advance(1, name)
    x = world.x.numpy()
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    found["cosine similarity of pictures"] = {"lds": lds(unit[N : N + QUERIES] @ unit[:N].T)}
    found["random"] = {"lds": lds(stream("tda_quality", "random").normal(size=(QUERIES, N)))}
    return found


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
    asked_for = parser.parse_args()
    halves, seeds, people = (40, 1, 8) if asked_for.quick else (100, 2, len(corpus.PEOPLE))
    result = {"digits": digits(halves, seeds), "facts": facts(people), "halves": halves, "seeds": seeds}
    publish("tda_quality", result, asked_for)


if __name__ == "__main__":
    main()
