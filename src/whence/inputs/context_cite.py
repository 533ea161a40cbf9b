"""Which sources in the context does this statement rest on? A sparse line over random halves of the context.

ContextCite (Cohen-Wang, Shah, Georgiev and Madry 2024) draws m ablations z in {0, 1}^n of the n sources, each kept
with p = 1/2, scores the unchanged response after each, and fits a line by lasso to standardised z:

    f(z) = sum over the target's tokens t of  logit p_t(z),     logit p = log p - log(1 - p)
    minimise over w, b   sum over z of  [ f(z) - b - w . z ]^2 / 2m  +  lambda sum over u of |w_u| sd(z_u)

A source's score is its weight w_u. A share of the ablations is held back: how well the line orders them is the linear
datamodelling score (LDS), Spearman's correlation of predicted and actual f. Lambda is chosen by cross-validation, the
largest within one standard error of the best, so that multiplying f changes nothing; if then all weights are zero,
the answer is "no evidence that any source did it", which is not the same as no effect.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.attribution import explanation_of, require
from ..engine.enough import rank_error
from ..engine.randomness import stream
from ..errors import MethodError
from ..method import Card

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..explanation import Explanation
    from ..question import Question

CARD = Card(
    name="context_cite",
    verb="ContextCite",
    paper="Cohen-Wang, Shah, Georgiev and Madry, ContextCite: Attributing Model Generation to Context, NeurIPS 2024",
    systems=(),
    question="Which sources in the context does this statement rest on?",
    units=("any unit; 3 or more",),
    works_on=("every model that answers a Question",),
    needs=("ask",),
    cost="ablations + 19 forwards: 83 at most",
    claim="The sentence that the answer was read from scores higher than its twin, which the answer does not need.",
    falsifier={
        "trial": "facts.single",
        "planted": "one sentence of the context holds the answer; its twin has the same form and is not asked for",
        "expect": 0.9,
        "control": "random scores, and its own scores with the units shuffled",
        "seconds": 25,
    },
    departs="f adds up the logits of the target's tokens; the paper, as we read it, takes the logit of the whole "
    "response's probability (target='response'; the same for one token). A Question without tokens is fitted as it is "
    "asked, without a logit. Lambda is chosen by cross-validation with the one-standard-error rule (the authors' code: "
    ".01 on f per token), which leaves fewer sources and smaller weights. No ablation is drawn twice. The held-back "
    "share, the bootstrap spread (lambda kept) and the random sets beside the top-k drop are Whence's additions.",
    avoid="For causes that no line shows: with two sources of which exactly one must be there (XOR), no weight is "
    "left. For three or four sources: there are 8 or 16 ablations, in which only large effects show. For a source's "
    "effect in numbers: lasso pulls weights towards zero, and half of the context is gone in a typical ablation.",
)

TARGETS = ("tokens", "response")
CERTAIN = 1e-7
"""Probabilities are held this far below 1, about what single precision can tell: a logit must be finite."""
FOLDS = 5
STEP = 16


@dataclass(frozen=True)
class ContextCite:
    """Settings: m ``ablations``, each source kept with probability ``keep``; ``target``: logits of "tokens" added up,
    or of the whole "response"; ``held_back`` share; ``resamples`` of the bootstrap; ``random_sets`` beside each top-k
    drop; ``draws`` of each ablation, more than one only where removed units are drawn anew. ``tolerance``: fewer
    ablations will do once the largest spread is that share of the range of the weights."""

    ablations: int = 64
    keep: float = 0.5
    target: str = "tokens"
    held_back: float = 0.2
    resamples: int = 50
    random_sets: int = 8
    draws: int = 1
    tolerance: float | None = None
    seed: int = 0

    def explain(self, question: Question) -> Explanation:
        """scores[unit]: w, in nats of log-odds (Questions without tokens: in the readout's units); ``spread``: standard
        deviation over bootstrap resamples of the ablations.

        ``details``: "lds" with its "value" (None: too few were held back, or no order in them) and "n"; "nothing":
        True where all weights are zero; "penalty"; "ablations", how many were asked; "top_k_drop": for each "k" the
        fall of the target's log-probability (else: of the readout) without the k best sources, "top", and the mean over
        "n" sets of k drawn sources, "random". Raises MethodError for fewer than 3 units and settings out of range.
        """
        began = time.perf_counter()
        require(question, "context_cite")
        n = len(question.units)
        self._check(n)
        rng = stream("context_cite", self.seed)
        z = _ablations(n, self.ablations, self.keep, rng)
        hold = round(self.held_back * len(z))
        hold = hold if hold >= FOLDS else 0  # fewer tell nothing
        f, rows = np.zeros(0), 0
        for upto in self._looks(hold, len(z)):
            said, _, asked = self._ask(question, z[len(f) : upto])
            f, rows = np.concatenate([f, said]), rows + asked
            w, b, spread, penalty = _lasso(z[hold:upto], f[hold:], self.resamples, rng)
            if self.tolerance is not None and rank_error(w, spread) <= self.tolerance:
                break
        nothing = not w.any()
        drops, more = ([], 0) if nothing else self._drops(question, w, rng)
        details = {
            "lds": {"value": _order(b + z[:hold] @ w, f[:hold]), "n": hold},
            "nothing": nothing,
            "penalty": penalty,
            "ablations": len(f),
            "top_k_drop": drops,
        }
        e = explanation_of(question, "context_cite", self, w, began, rows + more, spread, details)
        if "text" in question.capabilities:
            how = "added up over the target's tokens" if self.target == "tokens" else "of the whole target"
            e = replace(e, readout=f"{question.readout}: log-odds {how}, nats")
        note = "no evidence that any source did it: all weights are zero at the penalty chosen; not an effect of zero"
        return replace(e, notes=(note,)) if nothing else e

    def _looks(self, hold: int, most: int) -> list[int]:
        """After how many ablations the spread is looked at: all; with a tolerance every STEP, held-back ones first."""
        return [most] if self.tolerance is None else [*range(hold + 2 * STEP, most, STEP), most]

    def _drops(
        self, question: Any, w: NDArray[np.float64], rng: np.random.Generator
    ) -> tuple[list[dict[str, Any]], int]:
        """What is lost without the k best sources, and without k drawn ones; and the rows asked."""
        n = len(w)
        order = np.lexsort((rng.permutation(n), -w))  # sources of equal weight in a random order
        sizes = [k for k in (1, 3) if k < n]
        gone = [np.zeros((1, n), bool)]
        for k in sizes:
            gone += [np.isin(np.arange(n), order[:k])[None], rng.random((self.random_sets, n)).argsort(1) < k]
        _, value, rows = self._ask(question, ~np.concatenate(gone))
        lost = (value[0] - value[1:]).reshape(len(sizes), 1 + self.random_sets)
        return [
            {"k": k, "top": float(row[0]), "random": float(row[1:].mean()), "n": self.random_sets}
            for k, row in zip(sizes, lost, strict=True)
        ], rows

    def _ask(self, question: Any, keep: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
        """f and log-probability (or both: the readout) of keep[coalition, unit], each asked once; the rows asked."""
        distinct, back = np.unique(keep, axis=0, return_inverse=True)
        draws = 1 if "deterministic" in question.capabilities else self.draws
        rows = np.repeat(distinct, draws, 0)
        if "text" in question.capabilities:
            logp = np.asarray(question.ask_tokens(rows), np.float64)
            value = logp.sum(1)
            f = _logit(logp).sum(1) if self.target == "tokens" else _logit(value)
        else:
            f = value = np.asarray(question.ask(rows), np.float64)
        f, value = (x.reshape(-1, draws).mean(1)[back.reshape(-1)] for x in (f, value))
        return f, value, len(rows)

    def _check(self, n: int) -> None:
        if n < 3:
            raise MethodError(f"context_cite of {n} units", "too few for a line over random halves", "leave_one_out")
        if self.target not in TARGETS:
            raise MethodError(f"context_cite of the target {self.target!r}", "no such target", ", ".join(TARGETS))
        if not (0 < self.keep < 1 and 0 <= self.held_back <= 0.5):
            found = f"keep={self.keep:g}, held_back={self.held_back:g}"
            raise MethodError("context_cite", found, "keep between 0 and 1, held_back from 0 to 0.5")
        least = {"ablations": 2 * FOLDS, "resamples": 2, "random_sets": 1, "draws": 1}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise MethodError(f"context_cite with {name}={getattr(self, name)}", "too few", f"{number} or more")


def _ablations(n: int, m: int, keep: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """m different rows z[ablation, unit]; all there are, in a random order, where they are no more than m."""
    if 2**n <= m:
        return np.asarray((rng.permutation(2**n)[:, None] >> np.arange(n)) & 1 == 1)
    found: dict[tuple[bool, ...], None] = {}
    for _ in range(50 * m):  # fewer than m where ``keep`` leaves few that are likely
        if len(found) == m:
            break
        found[tuple((rng.random(n) < keep).tolist())] = None
    return np.array(list(found))


def _logit(logp: NDArray[np.float64]) -> NDArray[np.float64]:
    low = np.minimum(logp, np.log1p(-CERTAIN))
    return np.asarray(low - np.log(-np.expm1(low)))


def _lasso(
    z: NDArray[np.bool_], f: NDArray[np.float64], resamples: int, rng: np.random.Generator
) -> tuple[NDArray[np.float64], float, NDArray[np.float64], float]:
    """w, b, the spread of w and lambda: the largest whose cross-validated error is within a standard error of the
    least."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import Lasso, LassoCV
    from sklearn.model_selection import KFold

    mean, deviation, scale = z.mean(0), z.std(0), float(f.std())
    if np.ptp(f) <= 1e-9 * abs(f).max():
        return np.zeros(len(mean)), float(f.mean()), np.zeros(len(mean)), 0.0
    deviation[deviation == 0] = 1
    x, y = (z - mean) / deviation, (f - f.mean()) / scale
    grid = max(float(abs(x.T @ y).max()) / len(x), 1e-9) * np.logspace(0, -3, 30)  # from where all weights are zero
    folds = KFold(min(FOLDS, len(x)), shuffle=True, random_state=int(rng.integers(2**31)))
    with warnings.catch_warnings():
        # With few rows the least lambdas may not converge to the last digit; their error judges them all the same.
        warnings.simplefilter("ignore", ConvergenceWarning)
        errors = LassoCV(alphas=grid, cv=folds, max_iter=5_000).fit(x, y).mse_path_  # [lambda, fold], from the largest
        best = errors[errors.mean(1).argmin()]
        alpha = float(grid[errors.mean(1) <= best.mean() + best.std(ddof=1) / np.sqrt(len(best))].max())
        line = Lasso(alpha * (1 + 1e-9), max_iter=5_000)  # at the largest, a weight may be off zero by rounding
        w = np.array(line.fit(x, y).coef_)
        drawn = [np.array(line.fit(x[i], y[i]).coef_) for i in rng.integers(len(x), size=(resamples, len(x)))]
    w[abs(w) < 1e-9] = 0
    w *= scale / deviation
    return w, float(f.mean() - mean @ w), np.std(drawn, axis=0, ddof=1) * scale / deviation, alpha * scale


def _order(predicted: NDArray[np.float64], actual: NDArray[np.float64]) -> float | None:
    from scipy.stats import spearmanr

    if len(actual) < FOLDS or np.ptp(predicted) < 1e-12 or np.ptp(actual) < 1e-12:
        return None
    return float(spearmanr(predicted, actual).statistic)
