"""`whence seeds`: was it the seed, and which seeds are reliable for prompts like this?"""

from __future__ import annotations

import hashlib
import json as to_json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PromptError, RunError

if TYPE_CHECKING:
    from ..latents.reliable_seeds import Mined
    from ..verdict import Verdict

SCHEMA = "whence/seeds/1"
THUMBNAIL = 96


@dataclass(frozen=True)
class Asked:
    """The options of the command as typed."""

    model: str
    prompt: str
    seeds: str = "64"
    like: tuple[str, ...] = ()
    prompts: int = 4
    held_out: int = 4
    top: int = 8
    steps: int | None = None
    guidance: float | None = None
    judge: str = ""
    batch: int = 16
    journal: Path | None = None
    out: Path | None = None


def seeds(asked: Asked, json: bool) -> None:
    """Make the bank, mine it, try the winners on held-out prompts, and print the answer.

    Raises RunError for what is no seed, PromptError for prompts that cannot be judged or are too few, OutputError
    for a folder that cannot be written, all before any picture is made.
    """
    from ..engine.journal import Journal
    from ..engine.progress import progress
    from ..engine.seeds import check_seeds
    from ..latents.reliable_seeds import ReliableSeeds
    from ..verbs import load

    wanted = check_seeds(seeds_of(asked.seeds))
    if asked.prompts < 2 or asked.held_out < 1 or asked.batch < 1:
        found = f"--prompts {asked.prompts}, --held-out {asked.held_out}, --batch {asked.batch}"
        raise RunError("a bank of seeds", found, "2 prompts to choose by, 1 held out, 1 picture at a time, or more")
    method = ReliableSeeds(asked.top, steps=asked.steps, guidance=asked.guidance)
    method.must_fit(len(wanted))
    judge, mining, held = _prompts(asked)
    if asked.out:
        from ..report.folder import check_folder

        check_folder(asked.out)
    journal = Journal(asked.journal) if asked.journal else None
    model = load(asked.model)
    for prompt in (*mining, *held):  # a word that the model does not know is told before the first picture
        model.words(prompt)
        if hasattr(judge, "check"):
            judge.check(prompt)
    total = len(wanted) * len(mining) + 2 * asked.top * len(held)
    with progress("seeds", total=total, unit="pictures") as advance:
        how: dict[str, Any] = {"batch": asked.batch, "journal": journal, "advance": advance}
        mined = method.fit(model, wanted, mining, judge, thumbnails=THUMBNAIL if asked.out else 0, **how)
        verdict = mined.check(model, held, judge, **how)
    record = record_of(mined, verdict, held, model.name, getattr(judge, "name", asked.judge))
    if asked.out:
        from ..report.seeds_page import write_seeds

        record["report"] = str(write_seeds(record, mined, verdict, ["whence", *sys.argv[1:]], asked.out))
    print(to_json.dumps(record, indent=1, allow_nan=False) if json else _lines(record, verdict))
    sys.stdout.flush()


def seeds_of(text: str) -> tuple[int, ...]:
    """``--seeds``: how many from 0, a range A:B, or numbers with commas between.

    >>> seeds_of("3"), seeds_of("5:8"), seeds_of("7,3,11")
    ((0, 1, 2), (5, 6, 7), (7, 3, 11))
    """
    asked, works = f"--seeds {text}", "how many, as 64; a range, as 100:164; or seeds, as 7,3,11"
    if re.fullmatch(r"\d+", text):
        first, last = 0, int(text)
    elif match := re.fullmatch(r"(-?\d+):(-?\d+)", text):
        first, last = int(match[1]), int(match[2])
    elif re.fullmatch(r"-?\d+(,-?\d+)+", text):
        return tuple(map(int, text.split(",")))
    else:
        raise RunError(asked, "no number of seeds, range or list", works)
    if not 0 < last - first <= 100_000:
        raise RunError(asked, f"{max(last - first, 0)} seeds", f"1 to 100,000 seeds: {works}")
    return tuple(range(first, last))


def _prompts(asked: Asked) -> tuple[Any, tuple[str, ...], tuple[str, ...]]:
    """The judge, the prompts to choose seeds by (the asked one first) and the held-out ones."""
    if not asked.prompt.strip():
        raise PromptError("whence seeds", "no prompt", '--prompt "two green circles"')
    own = asked.model in ("shapes", "")
    if asked.judge:
        from ..worlds.registry import from_file

        found = from_file(asked.judge, "judge")
        if not callable(found):
            raise RunError(f"the judge {asked.judge!r}", f"it is {type(found).__name__}", "judge(prompt, image)")
        judge: Any = _FileJudge(asked.judge, found)
    elif own:
        from ..worlds.shapes.chance import judge
    else:
        raise RunError(f"seeds of {asked.model}", "nobody who tells right from wrong", "--judge file.py:function")
    more, needed = asked.like, asked.prompts + asked.held_out - 1
    if not more and own:
        from ..worlds.shapes import chance

        chance.judge.check(asked.prompt)
        more = chance.siblings(asked.prompt, needed)
    others = tuple(p for p in dict.fromkeys(more) if p != asked.prompt)
    if len(others) < needed:
        raise PromptError(
            f"{asked.prompts} prompts to choose seeds by and {asked.held_out} to check them on",
            f"{len(others) + 1} of this kind", "more --like PROMPT, or fewer --prompts and --held-out",
        )  # fmt: skip
    return judge, (asked.prompt, *others[: asked.prompts - 1]), others[asked.prompts - 1 : needed]


@dataclass(frozen=True)
class _FileJudge:
    """A judge of the user's own; another text of its file is another judge."""

    name: str
    function: Any

    @property
    def version(self) -> str:
        text = Path(self.name.rpartition(":")[0]).read_bytes()
        return f"{self.name} {hashlib.sha256(text).hexdigest()[:16]}"

    def check(self, prompt: str) -> None:
        getattr(self.function, "check", lambda _: None)(prompt)

    def __call__(self, prompt: str, image: Any) -> Any:
        return self.function(prompt, image)


def record_of(mined: Mined, verdict: Verdict, held: tuple[str, ...], model: str, judge: str) -> dict[str, Any]:
    """What ``--json`` prints."""
    bank, d = mined.bank, mined.differ
    at = {s: i for i, s in enumerate(bank.seeds)}
    e = mined.explain()
    assert e.spread is not None
    rows = [
        {"seed": s, "right": [bool(x) for x in bank.success[i]], "rate": float(bank.rates[i]),
         "standard_error": float(e.spread[i]), "p": float(mined.p[i]), "q": float(mined.q[i])}
        for s, i in at.items()
    ]  # fmt: skip
    return {
        "schema": SCHEMA, "method": "reliable_seeds", "model": model, "judge": judge,
        "prompts": list(bank.prompts), "held_out": list(held),
        "says": mined.says(verdict), "matter": verdict.word, "verdict": verdict.record(),
        "test": {"q": d.statistic, "freedom": d.freedom, "p": d.p, "p_chi_square": d.p_chi2},
        "rate": float(bank.success.mean()), "top": [rows[at[s]] for s in mined.top],
        "winners_curse": {k: verdict.details[k] for k in ("mined_rate", "held_out_rate", "random_rate")},
        "shares": {name: s.record() for name, s in mined.shares.items()},
        "seeds": rows, "pictures": bank.success.size + 2 * len(mined.top) * len(held),
    }  # fmt: skip


def _lines(record: dict[str, Any], verdict: Verdict) -> str:
    curse, test = record["winners_curse"], record["test"]
    lines = [record["says"], str(verdict)]
    lines.append(f"right: {record['rate']:.0%} of {len(record['seeds'])} seeds x {len(record['prompts'])} prompts")
    lines.append(f"top seeds: {', '.join(str(r['seed']) for r in record['top'])}")
    lines.append(
        f"they drew {curse['mined_rate']:.0%} right of what they were chosen on, {curse['held_out_rate']:.0%} of "
        f"other prompts, where random seeds drew {curse['random_rate']:.0%}"
    )
    lines.append(f"seeds differ: Q = {test['q']:.1f} ({test['freedom']} expected), p = {test['p']:.3g}")
    for name, s in record["shares"].items():
        if s["within"] is not None:
            low, high = s["interval"]
            lines.append(f"the seed's share of {name:<8} {s['within']:.2f} [{low:.2f}, {high:.2f}], p = {s['p']:.2g}")
    return "\n".join(lines + ([record["report"]] if "report" in record else []))
