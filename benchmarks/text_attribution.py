"""What does it cost to say where a text came from? Our side and its peers on the same questions, turn by turn.

    python -m benchmarks.text_attribution --json [--write] [--quick] [--repeats 3] [--only PART ...]

Prints one JSON object. Every side is a process of its own (the peers in environments of their own, which see our torch
and transformers) and reads the same folder: an untrained GPT-2 of 4 layers x 256, vocabulary 8,192, and a prompt of 16
sentences, 256 tokens, with 20 target tokens. They take turns; the first one also shows whether both sides give the same
numbers (within 1e-4 nats; a ratio beside other numbers is no ratio).

Primary clock: processor seconds, user and system, of one thread; wall seconds stand beside them and say how busy the
machine was. A ratio is ours over the peer's, the median over pairs that ran one after the other, with its range. Memory
is the highest resident size above rest in a fresh process (the kernel's own record), the model loaded and run once; two
processes are measured at a time. For AtMan's, which is held against one pass of some 20 MiB, the allocator is told to
give each freed block back at once: else the holes that it keeps, another number in each process, would be compared.

Peers in their fastest right mode: captum with the whole target in one pass; shap's partition explainer in its default
batch, stopped after as many versions as leave-one-out asks (Owen values: another estimator, so no numbers to compare);
context-cite one by one for time (its batches of 16 are slower), in batches of 16 for memory; inseq with sdpa attention.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.peer_process import FailedError, Side, python_for
from benchmarks.peers import PEERS, python_of
from benchmarks.recording import arguments, publish

PEERS.update(
    {
        "captum": (("matplotlib", "packaging", "tqdm"), "captum==0.9.0"),
        "shap": (("pandas", "slicer==0.0.8", "numba"), "shap==0.51.0"),
        "context_cite": (("pandas", "nltk>=3.8.2", "datasets", "spacy"), "context-cite==0.0.4"),
        # Its typeguard cannot share an environment with that of other packages.
        "inseq": (("jaxtyping", "typeguard==2.13.3", "treescope"), "inseq==0.7.1"),
    }
)
SAME = 1e-4
"""Nats by which the numbers of two sides may differ."""
MARKS = ["[unk]", "[pad]", "[end]", "...", ".", "Context:", "Query:", "[ask]", "[say]"]
PARTS = ("time", "memory", "exact", "atman", "long")


@dataclass(frozen=True)
class Race:
    """Our work against a peer's. ``aim``: the ratio that is wanted; ``compared``: array that both give."""

    name: str
    ours: str
    peer: str
    theirs: str
    aim: float | None
    compared: str = ""


TIMES = (
    Race("token leave-one-out / captum", "leave one out", "captum", "leave one out", 0.45, "scores"),
    Race("token leave-one-out / shap partition", "leave one out", "shap", "partition", 0.3),
    Race("ContextCite, 64 ablations and its own checks / context-cite", "context-cite", "context_cite", "one by one",
         0.6),
    Race("the same 64 ablations and lasso / context-cite", "the same 64", "context_cite", "one by one", 0.6, "logits"),
    Race("20-target input x gradient, one pass kept / inseq", "gradients", "inseq", "input x gradient", 0.4, "scores"),
    Race("20-target input x gradient, a question per target / inseq", "gradients one by one", "inseq",
         "input x gradient", None, "scores"),
)  # fmt: skip
MEMORIES = (
    Race("token leave-one-out / captum", "leave one out", "captum", "leave one out", None),
    Race("token leave-one-out / shap partition", "leave one out", "shap", "partition", None),
    Race("ContextCite / context-cite in batches of 16", "context-cite", "context_cite", "batches of 16", 0.2),
    Race("ContextCite / context-cite one by one", "context-cite", "context_cite", "one by one", None),
    Race("20-target input x gradient / inseq", "gradients", "inseq", "input x gradient", None),
)
MOST_MIB = 60.0
"""Token leave-one-out may take so much extra memory."""


def started(name: str, folder: Path, exact: bool = False) -> Side:
    """Ours or a peer's process; ``exact``: its memory goes back to the system as soon as it is free."""
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
    command = [python_for(name), "-m", f"benchmarks.peer_{name}"]
    return Side(name, folder, command, at_once if exact else None)


# -- models and texts -------------------------------------------------------------------------------------------------


def write_folder(folder: Path, kind: str, sentences: int, words: int, query: int, targets: int) -> Path:
    """An untrained model, a tokenizer of whole words and a task of drawn words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from whence.models.small_llama import VOCABULARY, build_llama

    size = VOCABULARY if kind == "llama" else 8_192
    vocabulary = [*MARKS, *(f"w{i}" for i in range(size - len(MARKS)))]
    whole = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="[unk]"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=whole, unk_token="[unk]", pad_token="[pad]", bos_token="[end]", eos_token="[end]"
    )
    tokenizer.chat_template = "[ask] {{ messages[0]['content'] }} [say] "
    if kind == "llama":
        model = build_llama(tokenizer, 0)
    else:
        layers, width, heads = {"small": (4, 256, 4), "wide": (12, 768, 12)}[kind]
        config = GPT2Config(
            vocab_size=size, n_embd=width, n_layer=layers, n_head=heads, n_positions=1_024, initializer_range=0.05,
            bos_token_id=2, eos_token_id=2, pad_token_id=1,
        )  # fmt: skip
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
    draw = random.Random(0)

    def some(n: int) -> str:
        return " ".join(draw.choices(vocabulary[len(MARKS) :], k=n))

    said = [some(words - 1) + " ." for _ in range(sentences)]
    task = {"prompt": " ".join(said), "context": " ".join(said), "sentences": said, "query": some(query),
            "target": some(targets)}  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "task.json").write_text(json.dumps(task))
    return folder


# -- measuring --------------------------------------------------------------------------------------------------------


def summary(values: Sequence[float], digits: int = 3) -> dict[str, Any]:
    """Median and range."""
    low, high = min(values), max(values)
    return {"median": round(statistics.median(values), digits), "range": [round(low, digits), round(high, digits)]}


def verdict(ratio: dict[str, Any], aim: float | None) -> dict[str, Any]:
    return {"ratio": ratio} | ({} if aim is None else {"aim": aim, "reached": ratio["median"] <= aim})


def time_races(folder: Path, repeats: int) -> dict[str, Any]:
    """Races of one peer share its turns: the peer once, then each of our works, then the peer again."""
    rows: dict[str, Any] = {}
    with started("whence", folder) as ours:
        for name in dict.fromkeys(r.peer for r in TIMES):
            races = [r for r in TIMES if r.peer == name]
            try:
                with started(name, folder) as peer:
                    rows |= _turns(ours, peer, races, repeats)
            except FailedError as error:
                rows |= {r.name: {"peer": name, "failed": str(error)} for r in races}
                _say(f"{name} failed: {error}")
    return rows


def _turns(ours: Side, peer: Side, races: Sequence[Race], repeats: int) -> dict[str, Any]:
    theirs: list[dict[str, Any]] = []
    mine: dict[str, list[dict[str, Any]]] = {r.ours: [] for r in races}
    for i in range(repeats):
        theirs.append(peer.turn(races[0].theirs))
        for r in races:
            mine[r.ours].append(ours.turn(r.ours))
        _say(f"{peer.package}: {i + 1} of {repeats}")
    first, seen = theirs[0], {name: turns[0] for name, turns in mine.items()}
    rows = {}
    for r in races:
        row: dict[str, Any] = {"peer": peer.package, "repeats": len(theirs)}
        for clock in ("cpu", "wall"):
            row[f"ours, {clock} seconds"] = summary([t[clock] for t in mine[r.ours]])
            row[f"peer, {clock} seconds"] = summary([t[clock] for t in theirs])
        row |= verdict(summary([a["cpu"] / b["cpu"] for a, b in zip(mine[r.ours], theirs, strict=True)]), r.aim)
        found = seen[r.ours]["found"]
        if r.compared:
            far = float(abs(found[r.compared] - first["found"][r.compared]).max())
            row |= {"largest difference, nats": far, "same numbers": far <= SAME}
        if "asked" in found:
            row["versions asked"] = int(found["asked"])
        if "weights" in found:
            held = ours.turn("held out")["found"]
            row["order of 64 held-out ablations, Spearman"] = {
                "ours": _order(held, found["weights"]), "peer": _order(held, first["found"]["weights"]),
            }  # fmt: skip
        rows[r.name] = row
    return rows


def _order(held: dict[str, Any], weights: Any) -> float | None:
    """How well a line orders values that it did not see; None for a line without slope."""
    from scipy.stats import spearmanr

    said = held["masks"] @ weights
    return None if np.ptp(said) == 0 else round(float(spearmanr(said, held["values"]).statistic), 3)


def fresh(folder: Path, works: Sequence[tuple[str, str]], repeats: int, exact: bool = False) -> dict[Any, Any]:
    """MiB above rest of each (side, work), each time in a process of its own; or why it failed."""

    def once(job: tuple[str, str]) -> float | FailedError:
        try:
            with started(job[0], folder, exact) as side:
                return float(side.turn(job[1], memory=True)["mib"])
        except FailedError as error:
            return error

    for peer in {name for name, _ in works} - {"whence"}:
        with suppress(subprocess.CalledProcessError):  # it fails again below, and says so
            python_of(peer)  # installed once, not by two at a time
    with ThreadPoolExecutor(2) as two:
        measured = list(two.map(once, [w for _ in range(repeats) for w in works]))
    found: dict[Any, Any] = {}
    for i, work in enumerate(works):
        mine = measured[i :: len(works)]
        failed = [m for m in mine if isinstance(m, FailedError)]
        found[work] = failed[0] if failed else mine
        _say(f"memory of {' '.join(work)}: {failed[0] if failed else summary(mine, 1)}")  # type: ignore[arg-type]
    return found


def memory_races(folder: Path, repeats: int) -> dict[str, Any]:
    works = [w for r in MEMORIES for w in (("whence", r.ours), (r.peer, r.theirs))]
    found, rows = fresh(folder, list(dict.fromkeys(works)), repeats), dict[str, Any]()
    for r in MEMORIES:
        ours, theirs = found["whence", r.ours], found[r.peer, r.theirs]
        row: dict[str, Any] = {}
        for side, value in (("ours", ours), ("peer", theirs)):
            failed = isinstance(value, FailedError)
            row |= {"failed": f"{side}: {value}"} if failed else {f"{side}, MiB": summary(value, 1)}
        if "failed" not in row:
            row |= verdict(summary([a / max(b, 0.1) for a, b in zip(ours, theirs, strict=True)]), r.aim)
        rows[r.name] = row
    spent = rows[MEMORIES[0].name].get("ours, MiB", {"median": float("inf")})
    rows["token leave-one-out, extra memory"] = {
        "ours, MiB": spent, "aim, MiB": MOST_MIB, "reached": spent["median"] <= MOST_MIB,
    }  # fmt: skip
    return rows


def exactness(folder: Path) -> dict[str, Any]:
    with started("whence", folder) as side:
        found = side.turn("exact")["found"]
    worst = float(found["worst"])
    return {"versions": int(found["versions"]), "largest difference from a plain pass, nats": worst, "aim": 1e-5,
            "reached": worst <= 1e-5}  # fmt: skip


def atman_memory(folder: Path, repeats: int) -> dict[str, Any]:
    """One row at a time, 12 layers x 768: what a pass, a pass with attention turned down and a gradient take."""
    works = ("forward", "forward, all logits", "one unit turned down", "every unit turned down", "gradient")
    found = {w: v for (_, w), v in fresh(folder, [("whence", w) for w in works], repeats, exact=True).items()}
    failed = [v for v in found.values() if isinstance(v, FailedError)]
    if failed:
        return {"failed": str(failed[0])}
    rows: dict[str, Any] = {f"{w}, MiB": summary(v, 1) for w, v in found.items()}
    plain = statistics.median(found["forward"])
    for work, aim in (("one unit turned down", 1.1), ("every unit turned down", 1.1), ("gradient", None)):
        rows[f"{work} / forward"] = verdict(summary([v / plain for v in found[work]]), aim)
    return rows


def long_prompt(folder: Path) -> dict[str, Any]:
    """Leave-one-out over all sentences of a long prompt, once."""
    with started("whence", folder) as side:
        turn = side.turn("long")
    cpu, wall, found = turn["cpu"], turn["wall"], turn["found"]
    return {"prompt tokens": int(found["tokens"]), "sentences": len(found["scores"]), "cpu seconds": round(cpu, 3),
            "wall seconds": round(wall, 3), "aim, seconds": 60, "reached": cpu < 60,
            "reached by the wall clock of this machine": wall < 60}  # fmt: skip


def not_reached(rows: dict[str, Any]) -> list[str]:
    """Names of all that was wanted and is not there, or could not be measured."""
    found = []
    for name, row in rows.items():
        if isinstance(row, dict):
            bad = row.get("reached") is False or row.get("same numbers") is False or "failed" in row
            found += ([name] if bad else []) + [f"{name}: {inner}" for inner in not_reached(row)]
    return found


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = arguments(str(__doc__))
    parser.add_argument("--quick", action="store_true", help="a prompt of 64 tokens, 5 targets, one turn each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    repeats = 1 if options.quick else options.repeats
    words, targets = (4, 5) if options.quick else (16, 20)
    result: dict[str, Any] = {
        "model": "untrained GPT-2, 4 layers x 256, vocabulary 8192", "units": 16 * words, "sentences": 16,
        "targets": targets, "repeats": repeats, "clock": "processor seconds of the process (user and system), 1 thread",
    }  # fmt: skip
    with TemporaryDirectory() as place:
        small, wide, llama = (Path(place) / kind for kind in ("small", "wide", "llama"))
        if {"time", "memory", "exact"} & set(options.only):
            write_folder(small, "small", 16, words, 8, targets)
        if "time" in options.only:
            result["time"] = time_races(small, repeats)
        if "memory" in options.only:
            result["memory"] = memory_races(small, min(repeats, 2))
        if "exact" in options.only:
            result["exact"] = exactness(small)
        if "atman" in options.only:
            result["AtMan, memory"] = atman_memory(write_folder(wide, "wide", 16, words, 8, targets), min(repeats, 2))
        if "long" in options.only:
            sentences = 12 if options.quick else 120
            result["long prompt"] = long_prompt(write_folder(llama, "llama", sentences, 33, 36, 20))
    publish("text_attribution", result | {"not reached": not_reached(result)}, options)


if __name__ == "__main__":
    main()
