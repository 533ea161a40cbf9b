"""`whence trace`: which component of the network carries a word into the picture, and is that true?"""

from __future__ import annotations

import json as to_json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MethodError, PromptError, RunError

if TYPE_CHECKING:
    from ..explanation import Explanation
    from ..verdict import Verdict

STEPS = 8
"""Denoising steps, unless others are asked for: a trace makes hundreds of pictures."""
PLACES = {"denoiser": "denoiser", "text-encoder": "text encoder"}


@dataclass(frozen=True)
class Asked:
    """The options of the command as typed."""

    model: str | None
    prompt: str
    word: str
    swap: str | None = None
    corrupt: str | None = None
    where: str = "denoiser"
    heads: bool = False
    kinds: str | None = None
    seed: int = 0
    seeds: int = 4
    fresh: int = 8
    steps: int | None = None
    guidance: float | None = None
    search: str = "all"
    journal: Path | None = None
    out: Path | None = None

    def check(self) -> None:
        """Raises the error of the first option that cannot be served."""
        if not self.prompt.strip():
            raise PromptError("--prompt ''", "the prompt is empty", "a few words, such as 'a red circle'")
        if not self.word.strip():
            raise PromptError("a trace", "no word", f"--word {self.prompt.split()[-1]}")
        if self.where not in PLACES:
            raise MethodError(f"--where {self.where}", "no such part", " or ".join(PLACES))
        if self.seeds < 1:
            raise RunError(f"--seeds {self.seeds}", "nothing to trace on", "1 or more")
        if self.fresh and self.fresh < 6:
            raise RunError(f"--fresh {self.fresh}", "too few for a verdict", "0, or 6 or more")
        if self.corrupt not in (None, "noise", "drop", "swap") or (self.corrupt == "swap" and not self.swap):
            found = "no word to put in its place" if self.corrupt == "swap" else "no such corruption"
            raise MethodError(f"--corrupt {self.corrupt}", found, "noise, drop, or --swap WORD")


def trace(asked: Asked, json: bool) -> None:
    """Run the command and print: JSON alone, or the ranked sites and the report's path."""
    asked.check()
    if asked.out:
        from ..report.folder import check_folder

        check_folder(asked.out)
    from .. import verbs
    from ..engine.journal import Journal
    from ..engine.patch import Corruption
    from ..engine.progress import progress
    from ..method import load as load_method
    from ..report.trace_page import TraceBundle, write_trace

    model = verbs.load(None if asked.model == "shapes" else asked.model)
    words = model.words(asked.prompt)
    words.find(asked.word)  # before any picture is made
    how = asked.corrupt or ("swap" if asked.swap else None)
    corruption = None if how is None else Corruption(how, other=asked.swap or "")
    method: Any = load_method("causal_trace")(
        word=asked.word, where=PLACES[asked.where], corruption=corruption, seeds=asked.seeds, heads=asked.heads,
        kinds=tuple(k.strip() for k in asked.kinds.split(",")) if asked.kinds else None, search=asked.search,
    )  # fmt: skip
    journal = Journal(asked.journal) if asked.journal else None
    sites = len(method.sites(model, asked.prompt))
    run = model.picture(asked.prompt, asked.seed, asked.steps or STEPS, asked.guidance)
    began = time.perf_counter()
    with progress("tracing", total=asked.seeds * (2 + sites), unit="pictures") as advance:
        bench = method.bench(run, 0, asked.seeds, advance=advance, journal=journal)
        found = method.found(bench, run, began)
    verdict = None
    if asked.fresh:
        with progress("verdict", total=asked.fresh * 6, unit="pictures") as advance:
            verdict = method.judge(run, found, asked.fresh, advance=advance, journal=journal)
    bundle = TraceBundle(found, _pictures(bench, found), verdict, ["whence", *sys.argv[1:]])
    record = bundle.record()
    if asked.out:
        record["report"] = str(write_trace(bundle, asked.out))
    print(to_json.dumps(record, indent=1) if json else _lines(found, verdict, record))
    sys.stdout.flush()


def _pictures(bench: Any, found: Explanation) -> dict[str, Any]:
    """One seed's pictures: clean, corrupted, and with each of the first four sites put back."""
    shown = {"clean": bench.clean[0].images[0], "corrupted": bench.corrupted[0].images[0]}
    for i in found.details["order"][:4]:
        made = bench.shown.get(((bench.sites[i],), 0))
        if made is not None:
            shown[bench.sites[i].label] = made.images[0]
    return shown


def _lines(found: Explanation, verdict: Verdict | None, record: dict[str, Any]) -> str:
    from ..report.fragments import interval, number

    word, total = record["word"], found.details["total"]
    lines = [f"“{word}”: {found.readout}; the corruption takes {number(sum(total) / len(total))}"]
    for row in record["sites"][:10]:
        ends = interval(tuple(row["interval"])) if None not in row["interval"] else ""
        near = "" if row["closeness"] is None else f"  closeness {number(row['closeness'])}"
        lines.append(f"  {number(row['effect']):>7} {ends:<18} {row['site']} ({row['kind']}){near}")
    cost = record["cost"]
    lines.append(f"{cost['runs']} pictures made, {cost['of_them_for_the_verdict']} of them for the verdict")
    lines += [str(verdict)] if verdict else []
    lines += list(found.notes)
    return "\n".join([*lines, *([record["report"]] if "report" in record else [])])
