"""Verdict: is the claim true? One rule for the three words *supported*, *refuted*, *undecided*.

A claim about *runs like this* is replicated over seeds: :func:`judge` holds the effects of n seeds against the
controls of the same seeds, :func:`sequential` does so at 8, 12 and 16 seeds. A claim about *this run* is deterministic
at its seed: :func:`judge_run` replicates it over alternatives and says where it stands among the controls.
``docs/verdict.md`` explains the rule and has its simulated error rates.

>>> v = judge([.31, .35, .28, .33, .30, .36, .29, .34], [.02, -.01, .03, .0, .01, .02, -.02, .01],
...           claim="'red' drew this circle", delta=0.1)
>>> v.word, v.n, round(v.effect, 3)
('supported', 8, 0.32)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain, combinations
from typing import TYPE_CHECKING, Any

from .errors import WhenceError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = Sequence[float] | NDArray[np.float64]

SUPPORTED, REFUTED, UNDECIDED = "supported", "refuted", "undecided"
RUNS_LIKE_THIS, THIS_RUN = "runs like this", "this run"
LOOKS = (8, 12, 16)
"""Numbers of seeds at which a verdict may be given."""
LOOK_ALPHA = {1: 0.05, 2: 0.0294, 3: 0.022, 4: 0.0182, 5: 0.0158}
"""Pocock's two-sided alpha of one look, by the number of looks: all looks together err at most one time in twenty."""
POWER = 0.8
"""``needed_n`` decides this often if the effect is what it seems."""
CONTROL_DOES_AS_MUCH = "the control does as much: more replicates would not tell them apart"
MOST = 10_000
"""Beyond this many replicates ``needed_n`` says None: no affordable number would decide."""
MOST_ALTERNATIVES = 50
"""The same for alternatives of one unit: no word has more that mean something."""


@dataclass(frozen=True)
class Verdict:
    """A claim and what came of its trial.

    ``effect``, ``control`` and ``beyond`` (effect minus control) are means over ``n`` replicates in ``unit``; their
    intervals have the level of one look. ``p`` is exact: sign flips of the paired effects for *runs like this*, the
    standing among the controls for *this run*. ``looks`` are those taken. ``needed_n`` is how many replicates would
    decide an undecided claim; None where it is decided or where no number would. ``replicate`` is "seed",
    "alternative", or what else was repeated: "picture", "draw", "question", "null". ``details`` may have the "evidence"
    and the "intervention": the lines printed after the claim.
    """

    claim: str
    word: str
    scope: str
    readout: str
    unit: str
    effect: float
    interval: tuple[float, float]
    control: float
    control_interval: tuple[float, float]
    beyond: float
    beyond_interval: tuple[float, float]
    delta: float
    n: int
    looks: tuple[int, ...]
    p: float
    needed_n: int | None
    replicate: str
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """The verdict in one line: word, scope, effect, control, what lies beyond it, n."""
        if not self.n:
            return f"{self.word} ({self.scope}): {self.details.get('why', 'nothing was measured')}"

        def value(mean: float, ends: tuple[float, float]) -> str:
            return f"{mean:.3g} [{ends[0]:.3g}, {ends[1]:.3g}]"

        against = self.details.get("control_name")
        text = (
            f"{self.word} ({self.scope}): effect {value(self.effect, self.interval)} (delta {self.delta:g}), "
            f"control {value(self.control, self.control_interval)}{f' ({against})' if against else ''}, "
            f"beyond it {value(self.beyond, self.beyond_interval)}; {self.unit + '; ' if self.unit else ''}"
            f"n={self.n} {self.replicate}s, p={self.p:.3g}"
        )
        if self.details.get("why"):
            text += f"; {self.details['why']}"
        if self.word == UNDECIDED:
            text += f"; {self.needed_n or 'no affordable number of'} {self.replicate}s would decide"
        return text

    def __str__(self) -> str:
        lines = {"claim": self.claim, "evidence": "", "intervention": "", "verdict": self.line}
        lines |= {k: str(self.details[k]) for k in ("evidence", "intervention") if k in self.details}
        return "\n".join(f"{name:<13}{text}" for name, text in lines.items() if text)

    def record(self) -> dict[str, Any]:
        """The JSON record; numbers that are not finite become null."""

        def plain(value: Any) -> Any:
            if isinstance(value, float):
                return value if math.isfinite(value) else None
            if isinstance(value, Mapping):
                return {str(k): plain(v) for k, v in value.items()}
            return [plain(v) for v in value] if isinstance(value, list | tuple) else value

        return {name: plain(getattr(self, name)) for name in self.__dataclass_fields__}

    def _repr_html_(self) -> str:
        from .report.fragments import verdict_html

        return verdict_html(self)


def _numbers(values: Iterable[float], name: str) -> NDArray[np.float64]:
    import numpy as np

    x = np.asarray(values if isinstance(values, np.ndarray) else list(values), dtype=np.float64)
    if x.ndim != 1 or not np.isfinite(x).all():
        found = f"shape {x.shape}" if x.ndim != 1 else f"{int((~np.isfinite(x)).sum())} of {x.size} are not finite"
        raise WhenceError(f"judge {name}", found, "one finite number per replicate")
    return x


def _check(delta: float, alpha: float) -> None:
    if not (math.isfinite(delta) and delta > 0):
        raise WhenceError("a verdict", f"delta is {delta}", "the smallest effect worth having, a number above 0")
    if not 0 < alpha < 0.5:
        raise WhenceError("a verdict", f"alpha is {alpha}", "a two-sided error rate between 0 and 0.5, as 0.022")


def t_interval(values: Values, alpha: float = LOOK_ALPHA[3]) -> tuple[float, float]:
    """The t interval of the mean at level 1 - ``alpha``; infinite for fewer than two values, a point for equal ones."""
    import numpy as np
    from scipy import special

    x = np.asarray(values, float)
    if len(x) < 2:
        return -math.inf, math.inf
    mean, half = x.mean(), special.stdtrit(len(x) - 1, 1 - alpha / 2) * x.std(ddof=1) / math.sqrt(len(x))
    return float(mean - half), float(mean + half)


def _t_p(gap: float, error: float, freedom: float) -> float:
    """Two-sided p of a t statistic; 0 or 1 where nothing varies."""
    from scipy import special

    if error < 1e-12 * max(abs(gap), 1e-300):
        return 0.0 if gap else 1.0
    return float(2 * special.stdtr(freedom, -abs(gap) / error)) if math.isfinite(error) else 1.0


def sign_flip_p(values: Values) -> float:
    """Two-sided p of the mean under all 2**n flips of signs; above 20 values, under 100,000 drawn flips and itself."""
    import numpy as np

    x = np.asarray(values, float)
    if not len(x):
        return 1.0
    observed, slack = abs(x.sum()), 1e-9 * np.abs(x).sum()
    if len(x) > 20:
        signs = np.random.default_rng(0).integers(0, 2, (100_000, len(x))) * 2.0 - 1
        return float((1 + (np.abs(signs @ x) >= observed - slack).sum()) / (1 + len(signs)))
    sums = x[:1]  # the other half of the flips has the same absolute sums
    for value in x[1:]:
        sums = np.concatenate([sums + value, sums - value])
    return float((np.abs(sums) >= observed - slack).mean())


def smallest_n(alpha: float) -> int:
    """Fewest seeds that may decide: with fewer, not even the exact sign-flip test could reach ``alpha``."""
    return max(3, 1 + math.ceil(-math.log2(alpha)))


def _needed(gap: float, sd: float, alpha: float, least: int) -> float:
    """Replicates for an interval that clears ``gap`` with probability POWER."""
    import numpy as np
    from scipy import special

    if gap <= 0:
        return math.inf
    ns = np.unique(np.concatenate([np.arange(least, 200), np.geomspace(200, MOST, 400).astype(int)]))
    enough = (special.stdtrit(ns - 1, 1 - alpha / 2) + special.ndtri(POWER)) * sd / np.sqrt(ns) <= gap
    return float(ns[enough.argmax()]) if enough.any() else math.inf


def _decide(
    mean: float, ends: tuple[float, float], beyond: float, beyond_ends: tuple[float, float], delta: float
) -> str:
    """The rule for the three words."""
    if mean >= delta and ends[0] > 0 and beyond_ends[0] > 0:
        return SUPPORTED
    if ends[1] < delta:
        return REFUTED
    return UNDECIDED


def _needed_n(
    mean: float, sd: float, beyond: float, beyond_sd: float, delta: float, alpha: float, n: int, least: int
) -> int | None:
    support = max(_needed(mean, sd, alpha, least), _needed(beyond, beyond_sd, alpha, least))
    best = support if mean >= delta else _needed(delta - mean, sd, alpha, least)
    return None if math.isinf(best) else max(int(best), n + 1)


def judge(
    effects: Iterable[float],
    controls: Iterable[float] | Mapping[str, Iterable[float]],
    *,
    claim: str,
    delta: float,
    readout: str = "effect",
    unit: str = "",
    alpha: float = LOOK_ALPHA[3],
    looks: Sequence[int] = (),
    replicate: str = "seed",
    **details: Any,
) -> Verdict:
    """The verdict on *runs like this* from paired replicates, in the direction "effect is above 0".

    ``effects[seed]`` and ``controls[seed]`` share their seeds. Several named controls may be handed; the strongest on
    average is used, which can only make support harder. Supported: mean >= ``delta``, the interval excludes 0 and so
    does the interval of effect minus control. Refuted: the interval ends below ``delta``. Else, and below
    :func:`smallest_n` replicates, undecided. Raises WhenceError for unequal lengths, numbers that are not finite, or a
    senseless ``delta`` or ``alpha``.
    """
    _check(delta, alpha)
    e = _numbers(effects, "the effects")
    named = controls if isinstance(controls, Mapping) else {"": controls}
    arms = {name: _numbers(values, f"the control {name}".strip()) for name, values in named.items()}
    wrong = [f"{len(c)} of control {name}".strip() for name, c in arms.items() if len(c) != len(e)]
    if wrong or not arms:
        raise WhenceError(
            "judge paired replicates", f"{len(e)} effects and {', '.join(wrong) or 'no control'}", "equal lengths"
        )
    if not len(e):
        return unmeasured(claim, RUNS_LIKE_THIS, "no seed was run", delta, readout=readout, unit=unit,
                          needed_n=smallest_n(alpha), **details)  # fmt: skip
    name = max(arms, key=lambda k: arms[k].mean())
    c, n, least = arms[name], len(e), smallest_n(alpha)
    b = e - c
    ends, beyond_ends = t_interval(e, alpha), t_interval(b, alpha)
    sd, beyond_sd = (float(x.std(ddof=1)) if n > 1 else math.inf for x in (e, b))
    mean, beyond = float(e.mean()), float(b.mean())
    word = _decide(mean, ends, beyond, beyond_ends, delta) if n >= least else UNDECIDED
    needed = None
    if word == UNDECIDED:
        known = n > 1
        needed = _needed_n(mean, sd, beyond, beyond_sd, delta, alpha, n, least) if known else least
        if mean >= delta and beyond <= 0:
            details["why"] = CONTROL_DOES_AS_MUCH
    parts = (_t_p(mean, sd / math.sqrt(n), n - 1), _t_p(beyond, beyond_sd / math.sqrt(n), n - 1)) if n > 1 else (1.0,)
    details |= {"alpha": alpha, "p_rule": max(parts), "p_beyond": sign_flip_p(b)}
    if name:
        details["control_name"] = name
        details["controls"] = {k: {"mean": float(v.mean()), "interval": t_interval(v, alpha)} for k, v in arms.items()}
    return Verdict(
        claim, word, RUNS_LIKE_THIS, readout, unit, mean, ends, float(c.mean()), t_interval(c, alpha), beyond,
        beyond_ends, delta, n, tuple(looks) or (n,), sign_flip_p(e), needed, replicate, details,
    )  # fmt: skip


def sequential(
    draw: Callable[[int], tuple[float, float | Mapping[str, float]]],
    *,
    claim: str,
    delta: float,
    looks: Sequence[int] = LOOKS,
    **more: Any,
) -> Verdict:
    """Draw replicates until a look decides: ``draw(i)`` gives effect and control (or named controls) of seed ``i``.

    ``looks`` are fixed before the first draw; each has the alpha that :data:`LOOK_ALPHA` gives their number.
    """
    plan = tuple(looks)
    if list(plan) != sorted(set(plan)) or len(plan) not in LOOK_ALPHA or plan[0] < 2:
        raise WhenceError("a sequential verdict", f"looks {plan}", "1 to 5 rising numbers of seeds, as 8, 12, 16")
    effects: list[float] = []
    controls: dict[str, list[float]] = {}
    for done, look in enumerate(plan, 1):
        while len(effects) < look:
            effect, control = draw(len(effects))
            effects.append(effect)
            for name, value in (control if isinstance(control, Mapping) else {"": control}).items():
                controls.setdefault(name, []).append(value)
        verdict = judge(
            effects, controls, claim=claim, delta=delta, looks=plan[:done], alpha=LOOK_ALPHA[len(plan)], **more
        )
        if verdict.word != UNDECIDED:
            break
    return verdict


@cache
def _picks(total: int, k: int) -> NDArray[np.intp]:
    """Ways to pick k of ``total``, the first k first: all, or 20,000 drawn ones."""
    import numpy as np

    if math.comb(total, k) <= 20_000:
        return np.fromiter(chain.from_iterable(combinations(range(total), k)), np.intp).reshape(-1, k)
    drawn = np.random.default_rng(0).permuted(np.tile(np.arange(total), (20_000, 1)), axis=1)[:, :k]
    drawn[0] = np.arange(k)
    return drawn


def exceedance_p(effects: Values, controls: Values) -> float:
    """One-sided exact p of the difference of means under all ways to pick ``len(effects)`` of the pooled values.

    Above 20,000 ways, under that many drawn ones and the observed one.
    """
    import numpy as np

    pool, k = np.concatenate([np.asarray(effects, float), np.asarray(controls, float)]), len(effects)
    sums = pool[_picks(len(pool), k)].sum(1)
    return float((sums >= pool[:k].sum() - 1e-9 * np.abs(pool).sum()).mean())


def judge_run(
    effects: Iterable[float],
    controls: Mapping[str, Iterable[float]],
    *,
    claim: str,
    delta: float,
    chance: float | None = None,
    tried_all: bool = False,
    readout: str = "effect",
    unit: str = "",
    alpha: float = LOOK_ALPHA[1],
    **details: Any,
) -> Verdict:
    """The verdict on *this run*, deterministic at its seed: where the effect stands among the controls.

    ``effects[alternative]``: one per replacement of the unit. ``controls[other][alternative]``: the same number for
    replacements of other units, by the other's name. The control is the mean over others, each counting once. Its
    interval and that of effect minus control (Welch) speak of other alternatives for the *same* units; the units are
    those of this run, not a sample of others. With ``tried_all`` the effects are those of every alternative there is:
    their mean is then a fact of this run without sampling error, and its interval a point. ``chance`` is the share of
    placements (a permutation of places, say) that do at least as well; without one it is :func:`exceedance_p` among
    the control swaps.

    Supported: as in :func:`judge`, and ``chance`` <= ``alpha``. Refuted: as in :func:`judge`. Undecided otherwise, and
    below 3 alternatives or 3 control swaps. One look, at ``alpha`` .05.
    """
    import numpy as np

    _check(delta, alpha)
    e = _numbers(effects, "the effects")
    others = {name: _numbers(values, f"the control {name}") for name, values in controls.items()}
    others = {name: values for name, values in others.items() if len(values)}
    if not len(e):
        return unmeasured(claim, THIS_RUN, "no alternative was run", delta, readout=readout, unit=unit,
                          needed_n=3, **details)  # fmt: skip
    k, mean = len(e), float(e.mean())
    sd = float(e.std(ddof=1)) if k > 1 else math.inf
    error = 0.0 if tried_all and k > 1 else sd / math.sqrt(k)
    ends = _around(mean, error, max(k - 1, 1), alpha)
    pooled = np.concatenate(list(others.values())) if others else np.zeros(0)
    control, control_error, freedom = math.nan, math.inf, 1.0
    if len(pooled) > 1:
        control = float(np.mean([c.mean() for c in others.values()]))
        inside = len(pooled) - len(others)
        # Swaps of one word vary about that word's own mean; with one swap a word, about the mean of all.
        about = others.values() if inside else [pooled]
        squares = sum(float(((c - c.mean()) ** 2).sum()) for c in about)
        freedom = inside or len(pooled) - 1
        control_error = math.sqrt(squares / freedom * sum(1 / len(c) for c in others.values())) / len(others)
    beyond, beyond_error = mean - control, math.hypot(error, control_error)
    welch = 1.0
    if 0 < beyond_error < math.inf:
        welch = beyond_error**4 / (error**4 / max(k - 1, 1) + control_error**4 / freedom)
    beyond_ends = _around(beyond, beyond_error, welch, alpha)
    p = chance if chance is not None else (exceedance_p(e, pooled) if len(pooled) else 1.0)
    enough = k >= 3 and len(pooled) >= 3
    word = _decide(mean, ends, beyond, beyond_ends, delta) if enough else UNDECIDED
    if word == SUPPORTED and p > alpha:
        word = UNDECIDED
        details["why"] = f"a share {p:.2g} of the controls does as well, above {alpha:g}"
    needed = None
    if word == UNDECIDED and "why" not in details:
        known = k > 1 and len(pooled) > 1
        needed = _needed_n(mean, sd, beyond, beyond_error * math.sqrt(k), delta, alpha, k, 3) if known else 3
        if not enough:
            needed = None if tried_all or k >= 3 else needed
            details["why"] = f"{k} alternatives and {len(pooled)} control swaps are too few (3 and 3)"
            if len(pooled) < 3:
                details["why"] += "; the control needs alternatives for other words too"
        elif mean >= delta and beyond <= 0:
            details["why"] = CONTROL_DOES_AS_MUCH
        elif tried_all:
            details["why"], needed = "all alternatives there are were tried", None
        if needed and needed > MOST_ALTERNATIVES:
            needed = None
    parts = (_t_p(mean, error, k - 1), _t_p(beyond, beyond_error, welch), p) if k > 1 else (1.0,)
    details |= {
        "alpha": alpha,
        "p_rule": max(parts),
        "controls": {name: {"mean": float(c.mean()), "n": len(c)} for name, c in others.items()},
        "alternatives_tried": "all" if tried_all else "some",
        "rank": [1 + sum(bool(c.mean() > mean) for c in others.values()), 1 + len(others)],
    }
    return Verdict(
        claim, word, THIS_RUN, readout, unit, mean, ends, control, _around(control, control_error, freedom, alpha),
        beyond, beyond_ends, delta, k, (k,), p, needed, "alternative", details,
    )  # fmt: skip


def _around(mean: float, error: float, freedom: float, alpha: float) -> tuple[float, float]:
    from scipy import special

    if not math.isfinite(mean + error):
        return -math.inf, math.inf
    half = float(special.stdtrit(freedom, 1 - alpha / 2)) * error
    return mean - half, mean + half


def unmeasured(
    claim: str, scope: str, why: str, delta: float, *, readout: str = "effect", unit: str = "",
    needed_n: int | None = None, **details: Any,
) -> Verdict:  # fmt: skip
    """An undecided verdict without a measurement, and why: no alternative is known, say."""
    nan, nowhere = math.nan, (-math.inf, math.inf)
    return Verdict(
        claim, UNDECIDED, scope, readout, unit, nan, nowhere, nan, nowhere, nan, nowhere, delta, 0, (), 1.0, needed_n,
        "alternative" if scope == THIS_RUN else "seed", {**details, "why": why},
    )  # fmt: skip


def correct(verdicts: Sequence[Verdict], q: float = 0.05) -> list[Verdict]:
    """Many claims together (Benjamini-Hochberg): *supported* that does not survive at ``q`` becomes *undecided*.

    The p of a claim is the largest of its rule's parts, times what the looks cost (.05 over the alpha of a look); each
    verdict gets ``details["q"]``, its adjusted p, and ``details["claims"]``. Order is kept. The sign-flip p would not
    do: its floor at 8 seeds is .0078, so that one claim among seven could never pass.
    """
    import numpy as np

    ps = np.array([min(1.0, v.details.get("p_rule", v.p) * 0.05 / v.details.get("alpha", 0.05)) for v in verdicts])
    order = np.argsort(ps, kind="stable")
    steps = ps[order] * len(ps) / np.arange(1, len(ps) + 1)
    adjusted = np.empty(len(ps))
    adjusted[order] = np.minimum(1, np.minimum.accumulate(steps[::-1])[::-1])
    out = []
    for verdict, value in zip(verdicts, adjusted.tolist(), strict=True):
        details = {**verdict.details, "q": value, "claims": len(ps)}
        if verdict.word == SUPPORTED and value > q:
            details["why"] = f"does not stand among {len(ps)} claims (q={value:.2g} above {q:g})"
            verdict = replace(verdict, word=UNDECIDED)
        out.append(replace(verdict, details=details))
    return out
