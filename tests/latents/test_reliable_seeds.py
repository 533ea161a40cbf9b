"""Seeds: planted reliable ones are found and hold on new prompts, where seeds do nothing the tool says so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from whence.engine.randomness import stream
from whence.engine.seeds import Bank, differ, each_seed, fill, share
from whence.errors import MethodError, PromptError, RunError
from whence.latents.reliable_seeds import ReliableSeeds
from whence.verbs import load
from whence.worlds.shapes.chance import judge, siblings

SEEDS = tuple(range(100, 140))


def bank(planted: float, name: object, prompts: int = 8, seeds: tuple[int, ...] = SEEDS) -> Bank:
    """Outcomes of prompts of several rates; the first ten seeds are right more often by ``planted``."""
    rng = stream("planted", name)
    rate = np.linspace(0.3, 0.6, prompts)[None] + planted * (np.array(seeds) < 110)[:, None]
    return Bank(seeds, tuple(f"{name} {p}" for p in range(prompts)), rng.random(rate.shape) < rate)


def test_planted_seeds_are_found_and_hold_on_new_prompts() -> None:
    mined = ReliableSeeds().mine(bank(0.45, "mining"))
    assert mined.differ.p < 0.01
    assert np.mean([s < 110 for s in mined.top]) > 0.6  # ten of forty: .25 by chance
    verdict = mined.on(bank(0.45, "new", 16, mined.top + mined.rivals))
    assert verdict.word == "supported"
    assert verdict.replicate == "seed"
    assert "Seeds matter here" in mined.says(verdict)


def test_the_winners_of_nothing_are_only_lucky() -> None:
    said, words, curse, told = [], [], [], []
    for i in range(12):
        mined = ReliableSeeds(draws=99).mine(bank(0.0, f"null {i}"))
        verdict = mined.on(bank(0.0, f"null new {i}", 16, mined.top + mined.rivals))
        said.append(mined.differ.p <= 0.05)
        words.append(verdict.word)
        curse.append(verdict.details["mined_rate"] - verdict.details["held_out_rate"])
        if not said[-1] and verdict.word != "supported":
            told.append(mined.says(verdict).startswith("Seeds do not matter here"))
            assert told[-1] or "No sign that seeds matter here" in mined.says(verdict)
    assert sum(told) >= 4  # the others have an interval that reaches too far
    assert np.mean(curse) > 0.15  # the winner's curse: what they were chosen by overstates them
    assert sum(said) <= 3
    assert words.count("supported") <= 1


def test_labels_dealt_anew_lose_what_was_planted() -> None:
    found = bank(0.35, "mining")
    dealt = Bank(found.seeds, found.prompts, stream("deal").permuted(found.success, axis=0))
    mined = ReliableSeeds().mine(dealt)
    verdict = mined.on(bank(0.35, "new", 16, mined.top + mined.rivals))
    assert verdict.word != "supported"


def test_the_statistic_is_cochrans_q_and_p_is_level() -> None:
    x = bank(0.2, "q").success
    r, k, n = x.sum(1), x.sum(0), len(x)
    # Cochran's Q with seeds as treatments and prompts as blocks, from its textbook form
    q = (n - 1) * (n * (r.astype(float) ** 2).sum() - r.sum() ** 2) / (n * k.sum() - (k.astype(float) ** 2).sum())
    found = differ(x)
    assert found.statistic == pytest.approx(q)
    assert found.p == pytest.approx(found.p_chi2, abs=0.02)
    ps = [differ(bank(0.0, i, 3).success, draws=99).p for i in range(100)]
    assert 0.0 <= np.mean(np.array(ps) <= 0.1) <= 0.2
    assert differ(np.ones((9, 3), bool)).p == 1.0


def test_each_seed_is_tested_exactly() -> None:
    x = bank(0.4, "each").success
    p, q = each_seed(x)
    even = np.repeat(x.mean(), 8)
    assert len(even) == 8
    law = stats.poisson_binom(x.mean(0)) if hasattr(stats, "poisson_binom") else None
    if law is not None:
        r = x.sum(1)
        want = np.minimum(1, 2 * np.minimum(law.cdf(r), law.sf(r - 1)))
        assert p == pytest.approx(want, abs=1e-6)
    assert (q >= p - 1e-12).all()
    assert q == pytest.approx(stats.false_discovery_control(p))


def test_the_share_of_a_planted_seed_is_measured_with_its_interval() -> None:
    rng = stream("shares")
    a, b = rng.normal(size=(60, 1)), 3 * rng.normal(size=(1, 10))
    found = share(a + b + rng.normal(size=(60, 10)))
    assert 0.35 < found.interval[0] < 0.5 < found.interval[1] < 0.65
    assert found.p < 0.01
    assert found.prompt > found.seed
    assert found.seed + found.prompt + found.both == pytest.approx(1)
    nothing = share(b + rng.normal(size=(60, 10)))
    assert nothing.within < 0.1
    assert nothing.p > 0.01


def test_the_share_equals_the_analysis_of_variance_and_takes_what_is_missing() -> None:
    rng = stream("anova")
    y = rng.normal(size=(30, 1)) + rng.normal(size=(1, 6)) + rng.normal(size=(30, 6))
    rows, columns = y.mean(1, keepdims=True), y.mean(0, keepdims=True)
    seed = 6 * rows.var(ddof=1)
    error = ((y - rows - columns + y.mean()) ** 2).sum() / (29 * 5)
    assert share(y, draws=9).within == pytest.approx((seed - error) / 6 / ((seed - error) / 6 + error))
    holes = np.where(rng.random(y.shape) < 0.1, np.nan, y)
    assert share(holes, draws=9).within == pytest.approx(share(y, draws=9).within, abs=0.12)
    assert np.isnan(share(np.ones((8, 4))).within)
    several = np.stack([y, y], -1)
    assert share(several, draws=9).within == pytest.approx(share(y, draws=9).within)


def test_order_of_seeds_and_prompts_changes_nothing() -> None:
    found = bank(0.3, "order")
    rng = stream("order of a bank")
    s, p = rng.permutation(len(found.seeds)), rng.permutation(len(found.prompts))
    other = Bank(tuple(found.seeds[i] for i in s), tuple(found.prompts[i] for i in p), found.success[s][:, p])
    assert differ(other.success, 9).statistic == pytest.approx(differ(found.success, 9).statistic)
    assert other.rates == pytest.approx(found.rates[s])
    one, two = share(found.success, draws=9), share(other.success, draws=9)
    assert one.within == pytest.approx(two.within)


def test_the_seed_of_the_embedded_model_says_where_things_stand() -> None:
    model = load()
    prompts = ("a red circle", *siblings("a red circle", 2))
    found = ReliableSeeds(top=4, draws=99, steps=3).fit(model, range(10), prompts, judge, batch=15, thumbnails=32)
    assert found.bank.success.shape == (10, 3)
    assert found.shares["layout"].p < 0.05
    assert found.bank.pictures[0, 0].startswith(b"\x89PNG")
    explanation = found.explain()
    assert explanation.scores.shape == (10,)
    assert explanation.units.names[3] == "3"


class Painter:
    """A model that draws a plain square as bright as its seed; it counts what it was asked."""

    default_size, steps, guidance, fingerprint = (8, 8), 1, 1.0, "painter"

    def __init__(self) -> None:
        self.asked = 0

    def words(self, prompt: str) -> None: ...

    def refuse(self, settings: Any) -> None: ...

    def generate_many(self, many: list[Any], batch: int) -> list[Any]:
        self.asked += len(many)
        images = [np.full((1, 8, 8, 3), s.seed, np.uint8) for s in many]
        return [type("Run", (), {"images": image})() for image in images]


def test_a_stopped_bank_goes_on_and_a_batch_is_no_matter(tmp_path: Any) -> None:
    from whence.engine.journal import Journal

    def stop(n: int = 1, note: str = "") -> None:
        raise KeyboardInterrupt

    def bright(prompt: str, image: Any) -> dict[str, float]:
        return {"success": float(image.mean() > 3), "light": image.mean()}

    model, path = Painter(), tmp_path / "seeds.jsonl"
    with pytest.raises(KeyboardInterrupt):
        fill(model, range(8), ["x", "y"], bright, batch=5, journal=Journal(path), advance=stop)
    assert model.asked == 5
    found = fill(model, range(8), ["x", "y"], bright, batch=5, journal=Journal(path))
    assert model.asked == 16
    other = fill(model, range(8), ["x", "y"], bright, batch=3)
    assert (found.success == other.success).all()
    assert found.attributes["light"][:, 0, 0].tolist() == list(range(8))
    assert share(found.attributes["light"], draws=19).within == pytest.approx(1)


@pytest.mark.parametrize(
    ("seeds", "says"), [([-1, 2], "no such seed"), ([2**63], "no such seed"), ([1, 2, 1], "seed 1 is there twice")]
)
def test_wrong_seeds_are_refused_before_any_picture(seeds: list[int], says: str) -> None:
    model = Painter()
    with pytest.raises(RunError, match=says):
        fill(model, seeds, ["x"], lambda p, i: True)
    assert model.asked == 0


def test_a_prompt_or_a_judge_that_will_not_do_is_refused() -> None:
    model = Painter()
    with pytest.raises(PromptError, match="no coloured shapes"):
        fill(model, [1, 2], ["on a an"], judge)
    with pytest.raises(PromptError, match="does not know house"):
        judge.check("a red house")
    assert model.asked == 0
    with pytest.raises(MethodError, match="judge's word"):
        fill(model, [1, 2], ["x"], lambda p, i: {"light": 3})
    with pytest.raises(MethodError, match="too few"):
        ReliableSeeds(top=8).mine(bank(0, "few", seeds=tuple(range(10))))
    with pytest.raises(MethodError, match="chosen on it"):
        ReliableSeeds().mine(bank(0, "same")).on(bank(0, "same"))


def test_named_parameters_learn_and_the_others_do_not() -> None:
    import torch

    from whence.engine.seeds import learn
    from whence.objective import Losses

    class Line:
        """y = (a + b) x, to be learned from points of slope 3."""

        def __init__(self) -> None:
            self.module = torch.nn.ParameterDict({"a": torch.zeros(1), "b": torch.ones(1)})

        def losses(self, examples: Any) -> Losses:
            x, y = torch.tensor(examples).T
            return Losses(((self.module["a"] + self.module["b"]) * x - y) ** 2)

    line = Line()
    line.module["b"].requires_grad_(False)
    found = learn(lambda step: line, [(x / 4, 3 * x / 4) for x in range(1, 9)], ["a"], 200, 4, 0.1)
    assert set(found) == {"a"}
    assert float(found["a"]) == pytest.approx(2, abs=0.05)
    assert float(line.module["a"].detach()) == 0
    assert line.module["a"].requires_grad
    assert not line.module["b"].requires_grad


def test_fine_tuning_changes_queries_and_keys_alone_and_comes_off() -> None:
    model = load()
    found = ReliableSeeds(steps=2, draws=9).mine(bank(0.2, "tune", 3))
    before = model.fingerprint
    change = found.tune(model, ["a red circle"], lambda prompt, image: prompt, seeds=(1, 2), steps=2, batch=2)
    assert model.fingerprint == before
    assert all(n.startswith("unet.") and n.rsplit(".", 2)[1] in ("to_q", "to_k") for n in change.after)
    assert any(bool((change.after[n] != change.before[n]).any()) for n in change.after)
    with change.on(model):
        assert model.fingerprint != before
    assert model.fingerprint == before
    assert not [n for n, p in model.denoiser.named_parameters() if not p.requires_grad or p.grad is not None]
    with pytest.raises(MethodError, match="no picture could be told"):
        found.tune(model, ["a red circle"], lambda prompt, image: "", seeds=(1,), steps=1)
