"""A bank of seeds: every prompt made with every seed and judged; and how much of what came out is the seed's doing.

A *judge* is ``judge(prompt, image) -> True or False``, or a mapping of names to numbers with "success" among them:
a number, or several for what has directions (a hue as cosine and sine, a layout as cells). NaN: not to be told in this
picture. ``judge.check(prompt)``, if there is one, raises for a prompt that it cannot judge, before pictures are made;
``judge.version`` or ``judge.name`` tells a journal whether it is the same judge.

The model is deterministic, so a picture is a function of prompt and seed:

    y[seed, prompt] = mean + a[seed] + b[prompt] + c[seed, prompt]

Only a[seed] can be used: it is what a seed does to every prompt alike. The null of all tests here is that within each
prompt the outcomes are dealt out to the seeds at random; it holds for any rate of success and any number of prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MethodError, RunError
from ..run import Settings
from .randomness import stream

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from .journal import Journal
    from .progress import Advance

Judge = Callable[[str, Any], Any]
SUCCESS = "success"
LAST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Bank:
    """``success[seed, prompt]`` (bool) and ``attributes[name][seed, prompt, component]`` (NaN: not to be told);
    ``pictures[seed, prompt]``: thumbnails as PNG bytes, where they were kept."""

    seeds: tuple[int, ...]
    prompts: tuple[str, ...]
    success: NDArray[np.bool_]
    attributes: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    pictures: Mapping[tuple[int, int], bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.seeds), len(self.prompts))
        wrong = {n: v.shape for n, v in self.attributes.items() if v.shape[:2] != shape or v.ndim != 3}
        if self.success.shape != shape or wrong:
            raise MethodError(
                f"a bank of {shape[0]} seeds and {shape[1]} prompts", f"success {self.success.shape}, {wrong}",
                "success[seed, prompt] and attributes[seed, prompt, component]",
            )  # fmt: skip

    @property
    def rates(self) -> NDArray[np.float64]:
        """Share of prompts that each seed draws right."""
        return np.asarray(self.success.mean(1))


def check_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """The same seeds. Raises RunError for none, for one twice, and for one that no generator takes."""
    found = tuple(int(s) for s in seeds)
    outside = [s for s in found if not 0 <= s <= LAST_SEED]
    if outside:
        raise RunError(f"the seed {outside[0]}", "the generator has no such seed", "0 to 2^63 - 1")
    twice = sorted({s for s in found if found.count(s) > 1}) if len(set(found)) < len(found) else []
    if twice:
        raise RunError(f"{len(found)} seeds", f"seed {twice[0]} is there twice", "each seed once")
    if not found:
        raise RunError("a bank of seeds", "no seed", "two seeds or more")
    return found


def fill(
    model: Any,
    seeds: Sequence[int],
    prompts: Sequence[str],
    judge: Judge,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    batch: int = 16,
    thumbnails: int = 0,
    journal: Journal | None = None,
    advance: Advance | None = None,
) -> Bank:
    """Make every prompt with every seed, judge each picture, keep no more than that and PNGs of ``thumbnails`` pixels.

    Steps and guidance are the model's own unless said. ``journal`` keeps finished batches, so that a stopped bank goes
    on. Raises RunError for seeds, PromptError for prompts, before any picture is made.
    """
    seeds, prompts = check_seeds(seeds), tuple(dict.fromkeys(prompts))
    tall, wide = model.default_size
    steps = model.steps if steps is None else steps
    guidance = model.guidance if guidance is None else guidance
    check = getattr(judge, "check", None)
    for prompt in prompts:
        model.words(prompt)
        model.refuse(Settings(prompt, seeds[0], steps, guidance, tall, wide))
        if check:
            check(prompt)
    about = (
        (model.fingerprint, getattr(judge, "version", getattr(judge, "name", repr(judge))), steps, guidance, thumbnails)
        if journal
        else ()
    )
    jobs = [(s, p) for p in range(len(prompts)) for s in range(len(seeds))]
    rows: dict[tuple[int, int], Any] = {}
    for start in range(0, len(jobs), batch):
        part = jobs[start : start + batch]
        piece = ("seeds", *about, *((seeds[s], prompts[p]) for s, p in part))
        found = journal.get(*piece) if journal else None
        if found is None:
            wanted = [Settings(prompts[p], seeds[s], steps, guidance, tall, wide) for s, p in part]
            runs = model.generate_many(wanted, batch=batch)
            found = [_row(judge, prompts[p], run.images[0], thumbnails) for (_, p), run in zip(part, runs, strict=True)]
            if journal:
                journal.put(found, *piece)
        rows |= dict(zip(part, found, strict=True))
        if advance:
            advance(len(part))
    return _bank(seeds, prompts, rows)


def _row(judge: Judge, prompt: str, image: NDArray[np.uint8], side: int) -> dict[str, Any]:
    """What the judge said, as JSON data, and the thumbnail."""
    said = judge(prompt, image)
    if not isinstance(said, Mapping):
        said = {SUCCESS: said}
    try:
        row: dict[str, Any] = {n: [float(x) for x in np.atleast_1d(np.asarray(v, float))] for n, v in said.items()}
        right = row.pop(SUCCESS)[0]
        if np.isnan(right):
            raise ValueError("success is not a number")
    except (KeyError, TypeError, ValueError) as error:
        raise MethodError(
            f"the judge's word on {prompt!r}", f"{said!r:.120} ({type(error).__name__}: {error})",
            'True or False, or a mapping of names to numbers with "success" among them',
        ) from None  # fmt: skip
    return {"right": right >= 0.5, "numbers": row, "png": _png(image, side) if side else ""}


def _png(image: NDArray[np.uint8], side: int) -> str:
    import base64
    import io

    from PIL import Image

    picture, data = Image.fromarray(image), io.BytesIO()
    picture.thumbnail((side, side))
    picture.save(data, "PNG", optimize=True)
    return base64.b64encode(data.getvalue()).decode()


def _bank(seeds: tuple[int, ...], prompts: tuple[str, ...], rows: dict[tuple[int, int], Any]) -> Bank:
    import base64

    shape = (len(seeds), len(prompts))
    success = np.zeros(shape, bool)
    widths = {name: len(v) for row in rows.values() for name, v in row["numbers"].items()}
    attributes = {name: np.full((*shape, width), np.nan) for name, width in widths.items()}
    for at, row in rows.items():
        success[at] = row["right"]
        for name, values in row["numbers"].items():
            attributes[name][at] = values
    pictures = {at: base64.b64decode(row["png"]) for at, row in rows.items() if row["png"]}
    return Bank(seeds, prompts, success, attributes, pictures)


# --- do seeds differ? ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Differ:
    """Cochran's Q of ``success``: how far the seeds' rates lie apart, ``freedom`` on average if seeds do not matter.
    ``p``: share of random deals with as large a Q, exact up to the number drawn; ``p_chi2``: by the chi-square law."""

    statistic: float
    freedom: int
    p: float
    p_chi2: float


def differ(success: NDArray[np.bool_], draws: int = 9_999, key: object = 0) -> Differ:
    """Do seeds differ by more than chance? ``success[seed, prompt]``. All right or all wrong: they do not (p = 1)."""
    from scipy import stats

    n = len(success)
    k = success.sum(0)
    spread = float((k * (n - k)).sum()) / n**2
    if n < 2 or spread == 0:
        return Differ(0.0, max(n - 1, 0), 1.0, 1.0)
    r = success.sum(1)
    q = (n - 1) / n * float(((r - r.mean()) ** 2).sum()) / spread
    rng, more = stream("seeds differ", key), 1
    for start in range(0, draws, 512):
        dealt = rng.permuted(np.broadcast_to(success, (min(512, draws - start), *success.shape)), axis=1).sum(2)
        found = (n - 1) / n * ((dealt - r.mean()) ** 2).sum(1) / spread
        more += int((found >= q - 1e-9).sum())
    return Differ(q, n - 1, more / (draws + 1), float(stats.chi2.sf(q, n - 1)))


def each_seed(success: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For each seed p (two-sided, exact: the number of its successes is a sum of coins with the prompts' rates) and its
    Benjamini-Hochberg q over all seeds."""
    law = np.ones(1)
    for rate in success.mean(0):
        law = np.convolve(law, [1 - rate, rate])
    below, above = np.cumsum(law), np.cumsum(law[::-1])[::-1]
    r = success.sum(1)
    p = np.minimum(1.0, 2 * np.minimum(below[r], above[r]))
    order = np.argsort(p, kind="stable")
    steps = p[order] * len(p) / np.arange(1, len(p) + 1)
    q = np.empty(len(p))
    q[order] = np.minimum(1, np.minimum.accumulate(steps[::-1])[::-1])
    return p, q


# --- how much of it is the seed? -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """Of the variance between pictures: ``seed``, ``prompt`` and ``both`` (what a seed does to one prompt alone) sum to
    1. ``within``: the seed's share of what varies at one prompt, seed / (seed + both), an intraclass correlation: 1, a
    seed does the same to every prompt; 0, nothing that it does carries over. ``interval`` is of ``within``, over seeds
    like these and these prompts. ``p``: share of random deals that reach it."""

    seed: float
    prompt: float
    both: float
    within: float
    interval: tuple[float, float]
    p: float

    def record(self) -> dict[str, Any]:
        """JSON data; what could not be told is null."""
        plain = [None if np.isnan(x) else float(x) for x in (self.seed, self.prompt, self.both, self.within)]
        ends = [None if np.isnan(x) else float(x) for x in self.interval]
        return {**dict(zip(("seed", "prompt", "both", "within"), plain, strict=True)), "interval": ends, "p": self.p}


def share(values: NDArray[Any], draws: int = 499, level: float = 0.95, key: object = 0) -> Share:
    """The shares of ``values[seed, prompt]`` or ``[seed, prompt, component]`` by a random-effects analysis of variance:
    the seed's part is the mean covariance of two prompts over seeds, which is unbiased for any distribution, and takes
    NaN. The interval is a bootstrap over seeds. All NaN where nothing varies or there are fewer than two prompts."""
    y = np.asarray(values, float)
    y = y[..., None] if y.ndim == 2 else y
    parts = _parts(y)
    nan = float("nan")
    nothing = Share(nan, nan, nan, nan, (nan, nan), 1.0)
    if y.shape[0] < 3 or y.shape[1] < 2 or not np.isfinite(parts).all() or parts[0] + parts[2] <= 1e-12:
        return nothing
    rng, n = stream("share", key), len(y)
    drawn = [_within(_parts(y[rng.integers(0, n, n)])) for _ in range(draws)]
    dealt = [_within(_parts(_deal(y, rng))) for _ in range(min(draws, 199))]
    own = _within(parts)
    drawn = [d for d in drawn if np.isfinite(d)]
    ends = np.quantile(drawn, [0.5 - level / 2, 0.5 + level / 2]) if drawn else (np.nan, np.nan)
    seed, prompt, both = (max(float(x), 0.0) for x in parts)
    total = seed + prompt + both
    p = (1 + sum(d >= own - 1e-12 for d in dealt)) / (1 + len(dealt))
    return Share(seed / total, prompt / total, both / total, max(own, 0.0),
                 (max(float(ends[0]), 0.0), max(float(ends[1]), 0.0)), p)  # fmt: skip


def _deal(y: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Seeds dealt anew within each prompt, the components of a picture together."""
    order = rng.permuted(np.tile(np.arange(len(y))[:, None], (1, y.shape[1])), axis=0)
    return np.asarray(np.take_along_axis(y, order[..., None], 0))


def _within(parts: NDArray[np.float64]) -> float:
    seed, _, both = parts
    return float(seed / (seed + both)) if seed + both > 1e-12 else float("nan")


def _parts(y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Variance of seed, prompt and both, summed over components; the first may come out below 0."""
    there = np.asarray(np.isfinite(y).all(-1))
    count = there.sum(0)
    means = np.where(there[..., None], y, 0).sum(0) / np.maximum(count, 1)[:, None]
    d = np.where(there[..., None], y - means, 0)
    pairs = there.astype(float).T @ there
    covariance = np.einsum("spc,sqc->pq", d, d) / np.where(pairs > 1, pairs - 1, np.nan)
    own = float(np.nanmean(np.diag(covariance)))
    off = covariance[~np.eye(len(covariance), dtype=bool)]
    seed = float(np.nanmean(off)) if np.isfinite(off).any() else np.nan
    prompt = float(means[count > 1].var(0, ddof=1).sum() - own / max(float(count.mean()), 1)) if len(means) > 1 else 0.0
    return np.array([seed, prompt, own - seed])


# --- learning from what seeds drew -----------------------------------------------------------------------------------


def learn(
    objective: Callable[[int], Any],
    examples: Sequence[Any],
    names: Sequence[str],
    steps: int,
    batch: int,
    rate: float,
    advance: Advance | None = None,
) -> dict[str, Tensor]:
    """Trains the parameters of these names on examples drawn at random, ``objective(step)`` for each step, by Adam with
    a rate that falls to 0. Gives the learned values; the module's own are put back bit for bit, whatever happens."""
    import torch

    module = objective(0).module
    own = {n: p for n, p in module.named_parameters() if n in set(names)}
    if not own or steps < 1:
        raise MethodError("fine-tuning", f"{len(own)} parameters, {steps} steps", "one or more of each")
    asked = {n: p.requires_grad for n, p in module.named_parameters()}
    kept = {n: p.data.clone() for n, p in own.items()}
    try:
        for n, p in module.named_parameters():
            p.requires_grad_(n in own)
        optimiser = torch.optim.Adam(own.values(), lr=rate)
        for step in range(steps):
            pick = stream("learn", step).choice(len(examples), min(batch, len(examples)), replace=False)
            loss = objective(step).losses([examples[i] for i in pick]).values.sum() / len(pick)
            optimiser.param_groups[0]["lr"] = rate * (1 - step / steps)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if advance:
                advance(1, f"loss {float(loss.detach()):.4f}")
        return {n: p.data.clone() for n, p in own.items()}
    finally:
        for n, p in module.named_parameters():
            p.requires_grad_(asked[n])
            if n in kept:
                p.data.copy_(kept[n])
                p.grad = None
