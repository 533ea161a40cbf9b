"""How often is a verdict wrong? Simulates the rule of `whence.verdict` on data with known effects.

    python -m benchmarks.verdict_simulation [--json] [--write] [--experiments N]

Effects are in units of delta, with a standard deviation of one delta between seeds; controls have half of that and
correlate .3 with the effects of their seeds. Noise shapes: normal; skewed up and down (exponential: now and then a
seed with far more, or far less); gappy (three seeds in ten show nothing, the others more). ``tests/test_verdict.py``
holds the vectorised rule used here against `judge` itself.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from scipy import special

from whence.verdict import LOOK_ALPHA, LOOKS, POWER, SUPPORTED, correct, judge, judge_run

SHAPES = ("normal", "skewed up", "skewed down", "gappy")
WORDS = np.array(["undecided", "supported", "refuted"])


def noise(rng: np.random.Generator, shape: str, size: tuple[int, ...]) -> np.ndarray:
    """Mean 0 and standard deviation 1, [..., seed]."""
    if shape.startswith("skewed"):
        return (rng.exponential(size=size) - 1) * (1 if shape == "skewed up" else -1)
    if shape == "gappy":
        shows = rng.random(size) < 0.7
        return (np.where(shows, 1 + 0.3 * rng.normal(size=size), 0) - 0.7) / np.sqrt(0.7 * 1.09 - 0.49)
    return rng.normal(size=size)


def paired(
    rng: np.random.Generator, n: int, effect: float, control: float, shape: str = "normal", arms: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Effects [experiment, seed] and controls [arm, experiment, seed] with these true means, in units of delta."""
    z = noise(rng, shape, (n, LOOKS[-1]))
    own = noise(rng, shape, (arms, n, LOOKS[-1]))
    return effect + z, control + 0.5 * (0.3 * z + np.sqrt(1 - 0.09) * own)


def bounds(x: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper ends of the t interval over the last axis."""
    n = x.shape[-1]
    half = special.stdtrit(n - 1, 1 - alpha / 2) * x.std(-1, ddof=1) / np.sqrt(n)
    return x.mean(-1) - half, x.mean(-1) + half


def verdicts(effects: np.ndarray, controls: np.ndarray, delta: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """The rule with three looks, vectorised: (word number in WORDS, n at the end) per experiment."""
    alpha = LOOK_ALPHA[len(LOOKS)]
    word = np.zeros(len(effects), int)
    n = np.full(len(effects), LOOKS[-1])
    for look in LOOKS:
        e, c = effects[:, :look], controls[:, :, :look]
        strongest = np.take_along_axis(c, c.mean(-1).argmax(0)[None, :, None], 0)[0]
        low, high = bounds(e, alpha)
        now = np.where((e.mean(-1) >= delta) & (low > 0) & (bounds(e - strongest, alpha)[0] > 0), 1, 0)
        now = np.where((now == 0) & (high < delta), 2, now)
        ends = (word == 0) & (now > 0)
        word, n = np.where(ends, now, word), np.where(ends, look, n)
    return word, n


def seeds_scope(n: int) -> dict[str, Any]:
    """Error rates and power of the verdict on runs like this."""
    alpha = LOOK_ALPHA[len(LOOKS)]
    rows = []
    cases = [
        ("no effect", 0, 0, 1), ("effect, and the control does as much", 2, 2, 1),
        ("the same against the strongest of three controls", 2, 2, 3), ("half of delta", 0.5, 0, 1),
        ("exactly delta", 1, 0, 1), ("1.5 delta", 1.5, 0, 1), ("2 delta", 2, 0, 1),
        ("2 delta against the strongest of three controls", 2, 0, 3),
    ]  # fmt: skip
    for shape in SHAPES:
        for name, effect, control, arms in cases:
            rng = np.random.default_rng([1, SHAPES.index(shape), arms, int(effect * 10)])
            e, c = paired(rng, n, effect, control, shape, arms=arms)
            word, seeds = verdicts(e, c)
            shares = {w: float((word == i).mean()) for i, w in enumerate(WORDS.tolist())}
            at_stop = np.array([row[:k].mean() for row, k in zip(e[word == 1], seeds[word == 1], strict=True)])
            rows.append(
                {
                    "noise": shape, "case": name, **shares, "mean_seeds": float(seeds.mean()),
                    "mean_effect_when_supported": float(at_stop.mean()) if len(at_stop) > 20 else None,
                }
            )  # fmt: skip
    coverage = {}
    for shape in SHAPES:
        x = noise(np.random.default_rng(7), shape, (n, LOOKS[-1]))
        coverage[shape] = {
            str(k): float(((lambda b: (b[0] <= 0) & (b[1] >= 0))(bounds(x[:, :k], alpha))).mean()) for k in LOOKS
        }
    return {"alpha_per_look": alpha, "nominal_coverage": 1 - alpha, "coverage": coverage, "cases": rows}


def needed_n(n: int) -> dict[str, Any]:
    """If an undecided verdict's estimates were the truth, how often does ``needed_n`` decide?"""
    rng = np.random.default_rng(3)
    out = {}
    for name, mean in (("supported", 1.2), ("refuted", 0.4)):
        z = rng.normal(size=8)
        z = (z - z.mean()) / z.std(ddof=1)
        first = judge(mean + 2 * z, 0 * z, claim="", delta=1.0)
        k = first.needed_n or 0
        e = mean + 2 * rng.normal(size=(n, k))
        low, high = bounds(e, LOOK_ALPHA[3])
        decided = low > 0 if name == "supported" else high < 1
        out[name] = {"needed_n": k, "decided": float(decided.mean()), "nominal": POWER}
    return out


def run_scope(n: int) -> list[dict[str, Any]]:
    """Error rates of the verdict on this run: 5 alternatives, against 5 other words with 3 swaps each."""
    rng = np.random.default_rng(5)
    cases = {
        "no effect, words alike": (0.0, [0, 0, 0, 0, 0]),
        "effect, and every other word does as much": (2.0, [2, 2, 2, 2, 2]),
        "effect, equal to the mean of unlike words": (2.0, [4, 4, 2, 0, 0]),
        "half of delta": (0.5, [0, 0, 0, 0, 0]),
        "2 delta": (2.0, [0, 0, 0, 0, 0]),
        "2 delta, one other word does as much": (2.0, [2, 0, 0, 0, 0]),
    }
    rows = []
    for sd in (0.5, 1.0):
        for name, (mean, others) in cases.items():
            words = []
            for _ in range(n):
                own = mean + sd * rng.normal(size=5)
                swaps = {str(i): m + sd * rng.normal(size=3) for i, m in enumerate(others)}
                words.append(judge_run(own, swaps, claim="", delta=1.0).word)
            rows.append({"sd": sd, "case": name, **{w: words.count(w) / n for w in WORDS.tolist()}})
    return rows


def many_claims(n: int, claims: int = 20, true: int = 5) -> dict[str, Any]:
    """Share of false among supported claims (mean over experiments), before and after `correct`, at the first look."""
    rng = np.random.default_rng(9)
    shares: dict[str, list[float]] = {"one by one": [], "corrected": []}
    found = {"one by one": 0, "corrected": 0}
    for _ in range(n):
        # The nulls do what their controls do, well above delta: only "beyond" can refuse them.
        every = [
            judge(2 + rng.normal(size=8), (2.0 if i >= true else 0.0) + rng.normal(size=8), claim="", delta=1.0)
            for i in range(claims)
        ]
        for name, batch in (("one by one", every), ("corrected", correct(every))):
            hits = [i for i, v in enumerate(batch) if v.word == SUPPORTED]
            shares[name].append(sum(i >= true for i in hits) / max(len(hits), 1))
            found[name] += sum(i < true for i in hits)
    return {k: {"false_share": float(np.mean(v)), "power": found[k] / (n * true)} for k, v in shares.items()}


def simulate(experiments: int = 20_000) -> dict[str, Any]:
    """All of it."""
    few = max(experiments // 20, 50)
    return {
        "schema": "whence.benchmark.verdict_simulation/1",
        "experiments": experiments,
        "runs_like_this": seeds_scope(experiments),
        "needed_n": needed_n(few),
        "this_run": run_scope(few),
        "many_claims": many_claims(max(few // 5, 20)),
    }


def print_tables(result: dict[str, Any]) -> None:
    """The result as a person reads it."""
    print(f"runs like this: looks {LOOKS}, alpha {result['runs_like_this']['alpha_per_look']} a look")
    for shape, shares in result["runs_like_this"]["coverage"].items():
        print(f"  coverage, {shape}: " + ", ".join(f"{k} seeds {v:.3f}" for k, v in shares.items()))
    print(f"  {'noise':11} {'case':50} supported refuted undecided  seeds  effect when supported")
    for r in result["runs_like_this"]["cases"]:
        shown = r["mean_effect_when_supported"]
        print(
            f"  {r['noise']:11} {r['case']:50} {r['supported']:9.3f} {r['refuted']:7.3f} {r['undecided']:9.3f} "
            f"{r['mean_seeds']:6.1f}  {'-' if shown is None else format(shown, '.2f')}"
        )
    print("this run: 5 alternatives against 5 other words of 3 swaps each")
    for r in result["this_run"]:
        print(f"  sd {r['sd']:<4} {r['case']:50} {r['supported']:9.3f} {r['refuted']:7.3f} {r['undecided']:9.3f}")
    print(f"needed_n: {result['needed_n']}")
    print(f"many claims: {result['many_claims']}")
    print(f"{result['experiments']} experiments a case, {result['seconds']} s")


def main() -> None:
    """Print the tables, or the JSON object alone."""
    from benchmarks.recording import arguments, publish

    parser = arguments(str(__doc__))
    parser.add_argument("--experiments", type=int, default=20_000, help="simulated experiments per case")
    options = parser.parse_args()
    if options.experiments < 100:
        parser.error("--experiments must be at least 100")
    start = time.perf_counter()
    result = simulate(options.experiments)
    result["seconds"] = round(time.perf_counter() - start, 1)
    if options.json or options.write:
        publish("verdict_simulation", result, options)
    else:
        print_tables(result)


if __name__ == "__main__":
    main()
