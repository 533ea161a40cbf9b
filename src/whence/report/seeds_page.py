"""The page of a bank of seeds: the prompt's picture with every seed, a frame and a sign that say whether it is right;
what is the seed's doing; the verdict on the best seeds. One file, no network, no script."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from .folder import SEEDS_RECORD, whole_folder
from .fragments import environment, number, style, verdict_parts

if TYPE_CHECKING:
    from ..latents.reliable_seeds import Mined
    from ..verdict import Verdict


def write_seeds(record: dict[str, Any], mined: Mined, verdict: Verdict, command: Sequence[str], out: Path) -> Path:
    """Write the report's folder, whole or not at all, and return the path of its page. Raises OutputError."""
    with whole_folder(out) as folder:
        (folder / SEEDS_RECORD).write_text(json.dumps(record, indent=1, allow_nan=False), encoding="utf8")
        (folder / "report.html").write_text(seeds_html(record, mined, verdict, command), encoding="utf8")
    return Path(out).expanduser().resolve() / "report.html"


def seeds_html(record: dict[str, Any], mined: Mined, verdict: Verdict, command: Sequence[str] = ()) -> str:
    """The page. The first prompt's pictures are shown, the others' in folded rows; best seeds come first."""
    bank = mined.bank
    order = sorted(range(len(bank.seeds)), key=lambda i: (bank.seeds[i] not in mined.top, -bank.rates[i]))
    grids = [
        {"prompt": prompt, "right": int(bank.success[:, p].sum()), "cells": [_cell(mined, i, p) for i in order]}
        for p, prompt in enumerate(bank.prompts)
    ]
    curse = record["winners_curse"]
    rates = [
        ("the best seeds, on the prompts they were chosen by", curse["mined_rate"]),
        ("the same seeds, on other prompts", curse["held_out_rate"]),
        ("random seeds, on those other prompts", curse["random_rate"]),
    ]
    shares = [(name, s, f"[{s['interval'][0]:.2f}, {s['interval'][1]:.2f}]") for name, s in record["shares"].items()
              if s["within"] is not None]  # fmt: skip
    v = verdict_parts(verdict)
    return environment().get_template("seeds_page.jinja").render(
        css=style("parts.css"), own=style("seeds_page.css"), version=__version__, record=record, grids=grids,
        rates=rates, shares=shares, v=v, p=number(record["test"]["p"]), top=[str(s) for s in mined.top],
        command=shlex.join(command) if command else "whence seeds",
    )  # fmt: skip


def _cell(mined: Mined, seed: int, prompt: int) -> dict[str, Any]:
    bank = mined.bank
    png = bank.pictures.get((seed, prompt), b"")
    return {
        "seed": bank.seeds[seed], "right": bool(bank.success[seed, prompt]), "top": bank.seeds[seed] in mined.top,
        "rate": f"{int(bank.success[seed].sum())}/{len(bank.prompts)}",
        "uri": f"data:image/png;base64,{base64.b64encode(png).decode()}" if png else "",
    }  # fmt: skip
