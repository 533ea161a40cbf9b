"""Which training examples? Our index and its peers on one model: time to build and to ask, bytes, agreement, LDS.

    python -m benchmarks.tda_peers --json [--write] [--quick] [--repeats 3] [--only SYSTEM ...]

*Cost and agreement*: a GPT-2 of 2 layers x 128 (437,760 weights, 8 linear layers) trained on 1,000 windows of 64 bytes
of Shakespeare; 10 held-out windows ask. Every side is a process of its own (peers in environments of their own), holds
model and data in memory and works with one thread; they take turns, so that a busy machine is busy for all. Processor
seconds come first, wall seconds stand beside them. A query is all 10 windows at once, on an index that is open and was
asked once before. Ratios are of two turns of one round; the median over rounds, with their range.

*Agreement*: NDCG@20 and Spearman with EK-FAC's scores, Kronfluence's and ours, mean over the 10 queries.

*Linear datamodelling score*: a GPT-2 of 1 layer x 48 on 400 windows, trained again on random halves; Spearman of the
summed scores of a half with what training on it made of a query's loss. Mean over queries with a 95 % bootstrap
interval, and the paired difference from the best peer.

Bytes: ``per example`` is what one more example adds; ``files`` is all that lies on the disk, divided by the examples.
A run that was stopped goes on: turns and retrainings are kept in the folder of temporary files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peer_process import FailedError, Side, python_for
from benchmarks.peer_turns import Works
from benchmarks.recording import arguments, publish
from benchmarks.trained_again import once

DATA = Path(os.environ.get("WHENCE_DATA", "../shared/data"))
LENGTH, WORDS = 64, 256
QUICK = 2.0
"""A query that takes less is asked again, three times."""
BEST = 20
BUILD_AIM, QUERY_AIM = 0.6, 0.1


@dataclass(frozen=True)
class World:
    """A model and its data. ``epochs`` of its training, ``batch`` windows a step."""

    name: str
    layers: int
    width: int
    heads: int
    examples: int
    queries: int
    epochs: int
    batch: int
    rate: float

    def windows(self) -> tuple[np.ndarray, np.ndarray]:
        """train[example, place] and queries[query, place]: neighbouring windows, the queries spread among them."""
        import gzip

        path = DATA / "tinyshakespeare" / "blocks.jsonl.gz"
        if not path.exists():
            raise SystemExit(f"no {path}: set WHENCE_DATA to the folder of the project's data")
        with gzip.open(path, "rt", encoding="utf8") as file:
            text = "".join(json.loads(line)["text"] for line in file).encode("latin1")
        total = self.examples + self.queries
        rows = np.frombuffer(text[: total * LENGTH], np.uint8).reshape(total, LENGTH).astype(np.int64)
        asks = np.zeros(total, bool)
        asks[np.linspace(0, total - 1, self.queries + 2)[1:-1].astype(int)] = True
        return rows[~asks], rows[asks]

    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:10]


COST = World("cost", 2, 128, 4, 1_000, 10, 20, 50, 3e-3)
LDS = World("lds", 1, 48, 4, 400, 40, 12, 40, 3e-3)


@dataclass(frozen=True)
class System:
    """``side``: the peer's environment and file, "whence" for ours; ``work``: what it is asked to do there."""

    name: str
    side: str
    work: str
    note: str = ""


OURS = "whence"
SMALL = {"bits": 2016, "numbers": 1792}
"""What "auto" keeps of an example of many, for the comparison at 2 KB."""
FORMS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "auto": ("a sketch of EK-FAC's coordinates: signs, then int8", SMALL, False),
    "auto judged": ("the same; its agreement with EK-FAC measured while building", SMALL, True),
    "signs": ("its signs alone", {"name": "signs", "bits": 2032, "numbers": 0}, False),
    "bits": ("signs of leading coordinates (EOGP)", {"name": "bits", "size": 16, "bits": 2032, "numbers": 0}, False),
    "int8": ("int8 (LoGRA)", {"name": "int8", "size": 16, "numbers": 0}, False),
}  # fmt: skip
"""work -> (what it is, its Form, whether it is judged while it is built)."""
EXACT = System("whence ekfac", OURS, "ekfac", "EK-FAC: nothing kept of an example, all gradients taken anew")
PASSES = System(
    "forward and backward", OURS, "passes", "no answer: what every gradient costs, the model's passes alone"
)
"""The physical limit of a build that sees each example once, and of a query."""
SYSTEMS = (
    *(System(f"whence {work}", OURS, work, said) for work, (said, *_) in FORMS.items()),
    EXACT,
    PASSES,
    System("Kronfluence", "kronfluence", "ekfac", "EK-FAC, damping by its rule of a tenth of the mean eigenvalue"),
    System("TRAK", "trak", "trak", "512 numbers of all gradients, below the number of examples; one block in memory"),
    System("Bergson", "bergson", "plain", "16 x 16 numbers a layer, inner products"),
    System("Bergson, Hessian", "bergson", "hessian", "the same, preconditioned by the gradients' second moments"),
    System("dattri LoGRA", "dattri", "logra", "16 x 16 numbers a layer, eFIM; in memory (its disk path wants a GPU)"),
    System("LogIX", "logix", "logra", "LoGRA of rank 16"),
    System("LoRIF", "lorif", "lorif", "the reference implementation"),
)
REFERENCES = {"Kronfluence": "Kronfluence's EK-FAC", EXACT.name: "our EK-FAC"}


# -- the models -------------------------------------------------------------------------------------------------------


def network(world: World, seed: int) -> Any:
    """An untrained GPT-2 without dropout."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from whence.engine.randomness import seed_of

    config = GPT2Config(
        vocab_size=WORDS, n_positions=LENGTH, n_embd=world.width, n_layer=world.layers, n_head=world.heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("tda_peers", world.name, seed))
        return GPT2LMHeadModel(config)


def losses(model: Any, rows: Any) -> Any:
    """Nats of each window, summed over its bytes."""
    from torch.nn import functional

    logits = model(rows, use_cache=False).logits[:, :-1]
    nats = functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    return nats.view(len(rows), -1).sum(1)


def trained(world: World, rows: Any, kept: np.ndarray, seed: int) -> Any:
    """A model trained on the windows that are kept. All of one seed start alike and see their windows in one order."""
    import torch

    from whence.engine.randomness import torch_stream

    model = network(world, seed).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=world.rate, weight_decay=0.01)
    g = torch_stream("tda_peers", "order", world.name, seed)
    keep = torch.from_numpy(kept)
    parts = [p for _ in range(world.epochs) for p in torch.randperm(len(rows), generator=g).split(world.batch)]
    for step, part in enumerate(parts):
        own = part[keep[part]]
        if not len(own):
            continue
        for group in optimiser.param_groups:
            group["lr"] = world.rate * (1 - step / len(parts))
        optimiser.zero_grad()
        losses(model, rows[own]).mean().div(LENGTH).backward()
        optimiser.step()
    return model.eval()


def folder_of(world: World, place: Path) -> Path:
    """The folder that all sides read: weights, a tokenizer of single bytes, train.npy, queries.npy and task.json."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = place / f"{world.name}-{world.key()}"
    if (folder / "task.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    train, queries = world.windows()
    _say(f"training the model of {world.name}")
    model = trained(world, torch.from_numpy(train), np.ones(len(train), bool), 0)
    model.save_pretrained(folder)
    each = Tokenizer(models.WordLevel({chr(i): i for i in range(WORDS)}, unk_token=chr(0)))
    each.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    each.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=each).save_pretrained(folder)
    np.save(folder / "train.npy", train)
    np.save(folder / "queries.npy", queries)
    kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    task = {"layers": [f"transformer.h.{i}.{k}" for i in range(world.layers) for k in kinds], "size": 16}
    with torch.no_grad():
        task["nats per byte"] = {
            name: round(float(losses(model, torch.from_numpy(rows)).mean()) / (LENGTH - 1), 3)
            for name, rows in (("train", train), ("queries", queries))
        }
    (folder / "task.json.part").write_text(json.dumps(task))
    (folder / "task.json.part").rename(folder / "task.json")
    return folder


def retrained(world: World, place: Path, halves: int, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """(kept[half, example], output[half, query]: minus the loss, mean over seeds), each training kept as it is made."""
    import torch

    from whence.engine.progress import progress
    from whence.engine.randomness import stream

    train, queries = world.windows()
    kept = np.zeros((halves, len(train)), bool)
    for j in range(halves):
        kept[j, stream("tda_peers", "half", j).permutation(len(train))[: len(train) // 2]] = True
    folder = place / f"halves-{world.key()}"
    folder.mkdir(parents=True, exist_ok=True)
    found = np.zeros((seeds, halves, len(queries)))
    rows, asked = torch.from_numpy(train), torch.from_numpy(queries)

    def told(j: int, seed: int) -> np.ndarray:
        model = trained(world, rows, kept[j], seed)
        with torch.no_grad():
            value: np.ndarray = losses(model, asked).numpy()
        return value

    with progress("retraining", total=halves * seeds, unit="models") as advance:
        for s in range(seeds):
            for j in range(halves):
                found[s, j] = -once(folder / f"{j}-{s}.npy", lambda j=j, s=s: told(j, s))
                advance(1)
            _say(f"retrained on {halves} halves, seed {s}")
    return kept, found.mean(0)


# -- our side, in a process of its own --------------------------------------------------------------------------------


def ours(folder: str) -> Works:
    """Through what a user would call: an index on disk is built, opened and searched."""
    from whence.influence.ekfac import EKFAC
    from whence.models.objectives import LanguageObjective
    from whence.models.text_loading import load_text
    from whence.objective import Listed
    from whence.store import training_index
    from whence.store.training_index import Form

    place = Path(folder)
    objective = LanguageObjective(load_text(folder, "cpu"), LENGTH)
    train, queries = (
        ["".join(map(chr, row)) for row in np.load(place / f"{name}.npy").tolist()] for name in ("train", "queries")
    )
    examples = Listed(tuple(train))
    held: dict[str, Any] = {}

    def works(name: str) -> Works:
        form, judge = Form(**FORMS[name][1]), FORMS[name][2]
        where = place / f"index {name}"

        def build() -> Mapping[str, Any]:
            if name in held:
                held.pop(name).index.close()
            shutil.rmtree(where, ignore_errors=True)
            training_index.build(objective, examples, where, form, judge=judge)
            return {}

        def opened() -> Mapping[str, Any]:
            held[name] = training_index.opened(where, objective, examples)
            size = sum(f.stat().st_size for f in where.rglob("*") if f.is_file())
            row = sum(held[name].bytes_per_example().values())
            return {"bytes": row, "files": size / len(examples)}

        def query() -> Mapping[str, Any]:
            found = held[name].search(queries, BEST)
            return {"best": [f.numbers for f in found]}

        def scores() -> Mapping[str, Any]:
            return {"scores": held[name].fitted.scores(queries)}

        return {f"build {name}": build, f"open {name}": opened, f"query {name}": query, f"scores {name}": scores}

    def factors() -> Mapping[str, Any]:
        held["ekfac"] = EKFAC().fit(objective, examples)
        return {"bytes": 0}

    def exact() -> Mapping[str, Any]:
        return {"scores": held["ekfac"].scores(queries)}

    def passes(texts: Sequence[str]) -> Mapping[str, Any]:
        """The losses and their gradients in the states that weights are multiplied with; no weight has one."""
        import torch

        from whence.engine.influence import BATCH

        model = objective.module
        for i in range(0, len(texts), BATCH):
            rows = torch.tensor([list(map(ord, t)) for t in texts[i : i + BATCH]])
            states = model.get_input_embeddings()(rows).detach().requires_grad_()
            logits = model(inputs_embeds=states, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
            torch.autograd.grad(loss, states)
        return {}

    found: dict[str, Any] = {"build ekfac": factors, "query ekfac": exact}
    found |= {"build passes": lambda: passes(train), "query passes": lambda: passes(queries)}
    for name in FORMS:
        found |= works(name)
    return found


# -- turns ------------------------------------------------------------------------------------------------------------


_SERVE = (
    "import whence; from benchmarks.tda_peers import ours; from benchmarks.peer_turns import serve; "
    "serve(ours, f'whence {whence.__version__}')"
)


def started(name: str, folder: Path) -> Side:
    """Ours or a peer's process. Raises FailedError."""
    if name in ABSENT:
        raise FailedError(ABSENT[name])
    os.environ["PIP_IGNORE_REQUIRES_PYTHON"] = "1"  # LogIX asks for a Python before 3.11
    served = ["-c", _SERVE] if name == OURS else ["-m", f"benchmarks.peer_{name}"]
    return Side(name, folder, [python_for(name), *served])


ABSENT = {"lorif": "cannot be had: the package index knows no package of this name"}
"""Peers that cannot be had, and why."""


def one_turn(side: Side, work: str) -> dict[str, Any]:
    """Build, (open,) ask: {"build", "query" [turn, cpu and wall], "scores", ...}. The first query warms up, unless it
    is a long one."""
    found: dict[str, Any] = {}
    built = side.turn(f"build {work}")
    found |= built["found"]
    if work in FORMS:
        opened = side.turn(f"open {work}")
        found |= opened["found"] | {"open": [opened["cpu"], opened["wall"]]}
    asked = [side.turn(f"query {work}")]
    if asked[0]["cpu"] < QUICK:
        asked = [side.turn(f"query {work}") for _ in range(3)]
    found |= asked[0]["found"]
    if "scores" not in found and work != PASSES.work:
        found |= side.turn(f"scores {work}")["found"]
    found["build"] = [built["cpu"], built["wall"]]
    found["query"] = [[a["cpu"], a["wall"]] for a in asked]
    return {k: np.asarray(v) for k, v in found.items()}


class Rounds:
    """All systems in turn, round by round; each turn kept, so that a run that was stopped goes on with the next."""

    def __init__(self, folder: Path, turns: Path) -> None:
        self.folder, self.turns = folder, turns
        turns.mkdir(parents=True, exist_ok=True)
        self._sides: dict[str, Side] = {}
        self.failed: dict[str, str] = {}
        self.package: dict[str, str] = {}

    def run(self, systems: Sequence[System], rounds: int) -> dict[str, list[dict[str, Any]]]:
        """system -> its turns."""
        found: dict[str, list[dict[str, Any]]] = {s.name: [] for s in systems}
        for r in range(rounds):
            for system in systems:
                if system.name in self.failed:
                    continue
                try:
                    turn = self._turn(system, r)
                except FailedError as error:
                    self.failed[system.name] = str(error)
                    self._close(system.side)
                    _say(f"{system.name} failed: {error}")
                    continue
                found[system.name].append(turn)
                build, query = turn["build"][0], np.median(turn["query"], 0)[0]
                _say(f"{self.folder.name}, round {r + 1} of {rounds}: {system.name} {build:.2f} s, {query:.4f} s")
        for name in list(self._sides):
            self._close(name)
        return {name: turns for name, turns in found.items() if name not in self.failed}

    def _turn(self, system: System, number: int) -> dict[str, Any]:
        path = self.turns / f"{system.name} {number}.npz"
        if not path.exists():
            if system.side not in self._sides:
                self._sides[system.side] = started(system.side, self.folder)
            side = self._sides[system.side]
            turn = one_turn(side, system.work) | {"package": np.array(side.package)}
            np.savez(path.with_suffix(".part.npz"), **turn)
            path.with_suffix(".part.npz").rename(path)
        with np.load(path) as kept:
            turn = dict(kept)
        self.package[system.name] = str(turn["package"])
        return turn

    def _close(self, name: str) -> None:
        if name in self._sides:
            self._sides.pop(name).close()


# -- judging ----------------------------------------------------------------------------------------------------------


def summary(values: Sequence[float], digits: int = 4) -> dict[str, Any]:
    """Median and range."""
    low, high = float(min(values)), float(max(values))
    return {
        "median": round(float(statistics.median(values)), digits),
        "range": [round(low, digits), round(high, digits)],
    }


def agreement(scores: np.ndarray, true: np.ndarray) -> dict[str, Any]:
    """NDCG@20 (gain: the reference's positive scores) and Spearman, mean over queries."""
    from scipy.stats import spearmanr
    from sklearn.metrics import ndcg_score

    ranks = [spearmanr(a, b).statistic for a, b in zip(scores, true, strict=True)]
    gains = [ndcg_score([np.clip(b, 0, None)], [a], k=BEST) for a, b in zip(scores, true, strict=True)]
    return {f"ndcg@{BEST}": round(float(np.mean(gains)), 3), "spearman": round(float(np.nanmean(ranks)), 3)}


def interval(values: np.ndarray, name: str) -> dict[str, Any]:
    """Mean over queries with its 95 % bootstrap interval."""
    from whence.engine.randomness import stream

    draws = stream("tda_peers", "bootstrap", name).integers(0, len(values), (10_000, len(values)))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    return {"mean": round(float(values.mean()), 4), "interval": [round(float(low), 4), round(float(high), 4)]}


def table(turns: Mapping[str, list[dict[str, Any]]], packages: Mapping[str, str]) -> dict[str, Any]:
    """A row for each system: seconds, bytes, agreement with EK-FAC."""
    from whence.engine.randomness import stream

    rows: dict[str, Any] = {}
    notes = {s.name: s.note for s in SYSTEMS}
    for name, own in turns.items():
        row: dict[str, Any] = {"package": packages[name], "what": notes[name], "rounds": len(own)}
        for i, clock in enumerate(("cpu", "wall")):
            row[f"build, {clock} seconds"] = summary([t["build"][i] for t in own], 3)
            row[f"query, {clock} seconds"] = summary([float(np.median(t["query"], 0)[i]) for t in own])
            if "open" in own[0]:
                row[f"open, {clock} seconds"] = summary([t["open"][i] for t in own])
        for key, said in (("bytes", "bytes per example"), ("files", "bytes of all files per example")):
            if key in own[0]:
                row[said] = round(float(own[0][key]), 1)
        rows[name] = row
        if "scores" in own[0]:
            row["agreement"] = {
                said: agreement(own[0]["scores"], turns[ref][0]["scores"])
                for ref, said in REFERENCES.items()
                if ref in turns and ref != name
            }
    some = next(iter(turns.values()))[0]["scores"]
    chance = stream("tda_peers", "chance").normal(size=some.shape)
    rows["random scores"] = {
        "agreement": {
            said: agreement(chance, turns[ref][0]["scores"]) for ref, said in REFERENCES.items() if ref in turns
        }
    }
    return rows


def against(turns: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Our seconds beside the fastest peer's, round by round, on both clocks."""
    peers = [s.name for s in SYSTEMS if s.side != OURS and s.name in turns]
    forms = [s.name for s in SYSTEMS if s.side == OURS and s not in (EXACT, PASSES) and s.name in turns]
    if not peers:
        return {}

    def build(name: str, i: int) -> list[float]:
        return [float(t["build"][i]) for t in turns[name]]

    def query(name: str, i: int) -> list[float]:
        return [float(np.median(t["query"], 0)[i]) for t in turns[name]]

    found: dict[str, Any] = {}
    fastest = min(peers, key=lambda n: statistics.median(build(n, 0)))
    asked = min((p for p in peers if p.startswith("Bergson")), default="", key=lambda n: statistics.median(query(n, 0)))
    for name in forms:
        row: dict[str, Any] = {}
        for i, clock in enumerate(("cpu", "wall")):
            ratio = summary([a / b for a, b in zip(build(name, i), build(fastest, i), strict=False)], 3)
            row[f"build / {fastest}, {clock}"] = ratio
            if asked:
                pair = zip(query(name, i), query(asked, i), strict=False)
                row[f"query / {asked}, {clock}"] = summary([a / b for a, b in pair], 3)
            if PASSES.name in turns:
                for work, seconds in (("build", build), ("query", query)):
                    pair = zip(seconds(name, i), seconds(PASSES.name, i), strict=False)
                    row[f"{work} / {PASSES.name}, {clock}"] = summary([a / b for a, b in pair], 3)
        row["build aim reached"] = row[f"build / {fastest}, cpu"]["median"] <= BUILD_AIM
        if asked:
            row["query aim reached"] = row[f"query / {asked}, cpu"]["median"] <= QUERY_AIM
        found[name] = row
    if PASSES.name in turns:
        ratio = [a / b for a, b in zip(build(PASSES.name, 0), build(fastest, 0), strict=False)]
        found[f"{PASSES.name} / {fastest}"] = {"build, cpu": summary(ratio, 3)}
        if asked:
            ratio = [a / b for a, b in zip(query(PASSES.name, 0), query(asked, 0), strict=False)]
            found[f"{PASSES.name} / {fastest}"]["query, cpu"] = summary(ratio, 3)
    return {"aims": {"build": BUILD_AIM, "query": QUERY_AIM}, **found}


def datamodelling(turns: Mapping[str, list[dict[str, Any]]], kept: np.ndarray, outputs: np.ndarray) -> dict[str, Any]:
    """LDS of each system with its interval, and its difference from the best peer's."""
    from whence.checks.lds import correlations
    from whence.engine.randomness import stream

    values = {n: correlations(own[0]["scores"], kept, outputs) for n, own in turns.items() if n != PASSES.name}
    some = next(iter(turns.values()))[0]["scores"]
    values["random scores"] = correlations(stream("tda_peers", "lds").normal(size=some.shape), kept, outputs)
    peers = [s.name for s in SYSTEMS if s.side != OURS and s.name in values]
    best = max(peers, key=lambda n: float(values[n].mean()), default="")
    rows = {}
    for name, own in values.items():
        rows[name] = interval(own, name)
        if best and name != best:
            rows[name][f"minus {best}"] = interval(own - values[best], f"{name} {best}")
    return {"best peer": best, "halves": len(kept), "queries": outputs.shape[1], "rows": rows}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = arguments(str(__doc__))
    parser.add_argument(
        "--quick", action="store_true", help="small, in less than a minute; our side alone, unless --only names peers"
    )
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--halves", type=int, default=60, help="0: no linear datamodelling score")
    parser.add_argument("--seeds", type=int, default=2, help="trainings on each half")
    parser.add_argument("--only", nargs="*", choices=[s.name for s in SYSTEMS])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "whence-tda-peers")
    parser.add_argument("--anew", action="store_true", help="forget the turns of a run that was stopped")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    cost, lds, rounds, halves, seeds = COST, LDS, options.repeats, options.halves, options.seeds
    systems = [s for s in SYSTEMS if not options.only or s.name in options.only]
    if options.quick:
        cost, lds = World("cost", 2, 64, 4, 96, 4, 1, 32, 1e-3), World("lds", 1, 16, 2, 64, 4, 2, 16, 3e-3)
        systems, rounds, halves, seeds = [s for s in systems if options.only or s.side == OURS], 1, 8, 1
    turns = options.work / f"turns-{cost.key()}-{lds.key()}"
    if options.anew:
        shutil.rmtree(turns, ignore_errors=True)
    folder = folder_of(cost, options.work)
    timed = Rounds(folder, turns / "cost")
    measured = timed.run(systems, rounds)
    task = json.loads((folder / "task.json").read_text())
    result: dict[str, Any] = {
        "model": {**asdict(cost), "weights": sum(p.numel() for p in network(cost, 0).parameters()),
                  "nats per byte": task["nats per byte"]},
        "systems": table(measured, timed.package), "against peers": against(measured),
    }  # fmt: skip
    judged = Rounds(folder, turns / "lds")
    if halves:
        judged = Rounds(folder_of(lds, options.work), turns / "lds")
        kept, outputs = retrained(lds, options.work, halves, seeds)
        scored = judged.run([s for s in systems if s != PASSES], 1)
        result["lds"] = {"model": asdict(lds), "seeds": seeds, **datamodelling(scored, kept, outputs)}
        result["lds"]["agreement"] = {name: row["agreement"] for name, row in table(scored, judged.package).items()}
    else:
        result["lds"] = "not measured: --halves 0"
    result["failed"] = timed.failed | {f"{name} (lds)": why for name, why in judged.failed.items()}
    publish("tda_peers", result, options)
    if not options.only:
        shutil.rmtree(turns, ignore_errors=True)


if __name__ == "__main__":
    main()
