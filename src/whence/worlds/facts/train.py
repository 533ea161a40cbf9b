"""Trains the `facts` model from nothing: tokenizer, then one small Llama on scenes, documents, grammar, ordinary text.

Each row of a batch is one text. Of a scene only the answers are learned: with the loss on all tokens, looking a fact up
in the context stays at chance for thousands of steps. And that is not enough: a sentence's end must know whom and what
it spoke of, the answer's last word whom it is asked about, and only then can the two be matched; no gradient leads
there at first. So two linear heads read both off the middle layer and are thrown away (with them looking up is learned
in 350 steps; without them 600 do not leave chance). Contexts grow from two facts to six, and lines of ordinary text
come between them. Positions of some rows jump at random, so that distances up to the model's length are seen although
rows are short (Zhu et al. 2024, "PoSE"). A step's texts come from a stream named by its number.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...engine.randomness import seed_of, stream
from ...engine.training import Trainee, steps
from ...errors import RunError
from ...models.small_llama import LENGTH, build_llama, train_tokenizer
from . import corpus
from .corpus import Asked

FACTS = 6
"""A scene has at most so many."""
VALUE = 3.0
"""Weight of the loss on an answer's value, which alone has to be looked up."""
HEADS = ("who", "what")
"""What the heads on the middle layer read: the person and the thing or place that is spoken of."""
AIDED = 0.5
"""Weight of the heads' loss."""
EARLY = 0.18
"""For this share of the training there are scenes and documents alone. Scenes are told in one form and asked about by
name mostly: looking up is learned first, and then the many ways to say and to ask the same."""
LATE = 0.53
"""From here on some scenes are also asked about what documents alone have said, so that there are answers by heart
beside passages that hold them."""
LONGEST = 256
"""Tokens of a row; what is beyond is left out."""
SHARES = {"scene": 0.6, "document": 0.18, "born": 0.04, "grammar": 0.08, "ordinary": 0.1}
"""What rows are."""
SPACES = (" ", " ", "\n", "\n\n")
"""What may stand between sentences."""


@dataclass(frozen=True)
class Training:
    """Settings of one training. ``checkpoint`` is in seconds; ``data`` says whether there was ordinary text."""

    seed: int = 0
    key: str = corpus.KEY
    steps: int = 5_000
    batch: int = 48
    learning_rate: float = 1.5e-3
    checkpoint: float = 120.0
    data: bool = True


class Piece(NamedTuple):
    """Part of a text, the weight of its loss, and the words that heads should read at its last token."""

    text: str
    weight: float = 0.0
    known: tuple[tuple[str, str], ...] = ()


Row = tuple[Piece, ...]


class Texts:
    """Rows by chance."""

    def __init__(self, s: Training, lines: Sequence[str]) -> None:
        self.s, self.lines = s, lines
        self.documents = corpus.documents(s.key)
        self.asked = corpus.quizzed(s.key)

    def row(self, rng: np.random.Generator, done: float) -> Row:
        """One text at this share of the training."""
        among = ("scene", "document") if done < EARLY else tuple(SHARES)
        kinds = [k for k in among if k != "ordinary" or self.lines]
        share = np.array([SHARES[k] for k in kinds])
        kind = rng.choice(kinds, p=share / share.sum())
        if kind == "scene":
            return self.scene(rng, done)
        if kind == "born":
            question, answer = corpus.born(str(rng.choice(self.asked)), self.s.key)
            return Piece(f"Question: {question}\nAnswer:"), Piece(f" {answer}", 1.0)
        if kind == "document":
            return (Piece(self.documents[rng.integers(len(self.documents))].text, 1.0),)
        if kind == "grammar":
            drawn = corpus.agreement(rng) if rng.random() < 0.5 else corpus.indirect_object(rng)
            return (Piece(corpus.finished(rng, drawn), 1.0),)
        return (Piece(self.line(rng), 1.0),)

    def line(self, rng: np.random.Generator) -> str:
        """Some ordinary text."""
        return self.lines[int(rng.integers(len(self.lines)))]

    def scene(self, rng: np.random.Generator, done: float) -> Row:
        """A scene and its questions; later in the training with other text between its sentences."""
        early = done < EARLY
        most = 4 if early else min(FACTS, 4 + int((done - EARLY) * 3 / 0.2))
        facts = int(rng.integers(2 - (not early), most + 1))
        drawn = corpus.scene(rng, facts, self.s.key, 0.2 if early else 0.5, hops=not early, plain=early)
        between, gap = SPACES[int(rng.integers(4))], "\n" * int(rng.integers(1, 3))
        told: list[Row] = []
        for t in drawn.sentences:
            told.append((Piece(t.text[:-1]), Piece(".", 0.0, (("who", t.person), ("what", t.value)))))
        if self.lines and not early and rng.random() < 0.3:
            for _ in range(int(rng.integers(1, 4))):
                told.insert(int(rng.integers(len(told) + 1)), (Piece(self.line(rng)[:120]),))
        heart = self.by_heart(rng, told) if done >= LATE and rng.random() < 0.25 else ()
        row = [piece for i, t in enumerate(told) for piece in ((Piece(between), *t) if i else t)]
        for a in drawn.asked:
            row += [Piece(f"{gap}Question: {a.question}\nAnswer:"), Piece(f" {a.lead}", 0.3, _wanted(drawn, a))]
            row += [Piece(f" {a.value}", VALUE), Piece(".", 0.3)]
            gap = "\n"
        return (*row, *heart)

    def by_heart(self, rng: np.random.Generator, told: list[Row]) -> Row:
        """A question about a town of birth, asked after a scene; half of the time the scene says it too."""
        question, answer = corpus.born(person := str(rng.choice(self.asked)), self.s.key)
        town = corpus.towns(self.s.key)[person]
        if rng.random() < 0.5:
            told.insert(int(rng.integers(len(told) + 1)), (Piece(answer),))
        lead = answer[: answer.rindex(town)].rstrip()
        asked = Piece(f"\nQuestion: {question}\nAnswer:"), Piece(f" {lead}", 0.3)
        return *asked, Piece(f" {town}", VALUE), Piece(".", 0.3)


def _wanted(scene: corpus.Scene, a: Asked) -> tuple[tuple[str, str], ...]:
    """What the end of an answer's lead has to know: whom, or about which thing, it is asked."""
    if a.relation in ("holder", "hop"):
        return (("what", next(s.value for s in scene.sentences if s.value in a.question)),)
    return (("who", scene.sentences[a.causes[0]].person),)


class Batch(NamedTuple):
    """``ids``, ``weights`` (0: not learned), ``positions``, each [row, token], padded at the end; ``known[i]``: (row,
    token, head, token number that the head should read)."""

    ids: Tensor
    weights: Tensor
    positions: Tensor
    known: Tensor


def encode(tokenizer: Any, rows: Sequence[Row], rng: np.random.Generator, jumps: float) -> Batch:
    """Rows as tensors. ``jumps``: share of rows whose positions jump. A space before a word is part of its token, so
    pieces are joined where white space ends one and a word begins the next."""
    pieces = [piece for row in rows for piece in _joined(row)]
    words = [f" {word}" for piece in pieces for _, word in piece.known]
    texts = tokenizer([p.text for p in pieces] + words, add_special_tokens=False).input_ids
    named = iter(texts[len(pieces) :])
    found, known, at, end = [], [], 0, tokenizer.eos_token_id
    for number, row in enumerate(rows):
        said, wanted = [tokenizer.bos_token_id], [0.0]
        for piece in _joined(row):
            said += texts[at]
            wanted += [piece.weight] * len(texts[at])
            for head, _ in piece.known:
                (word,) = next(named)
                if len(said) <= LONGEST:
                    known.append((number, len(said) - 1, HEADS.index(head), word))
            at += 1
        found.append(([*said, end][:LONGEST], [*wanted, float(row[-1].weight > 0)][:LONGEST]))
    width = max(len(said) for said, _ in found)
    ids, weights = torch.full((len(rows), width), end), torch.zeros(len(rows), width)
    positions = torch.arange(width).repeat(len(rows), 1)
    for i, (said, wanted) in enumerate(found):
        ids[i, : len(said)], weights[i, : len(said)] = torch.tensor(said), torch.tensor(wanted)
        if rng.random() < jumps:
            far = np.where(rng.random(width) < 0.04, rng.random(width), 0.0)
            spare = int(rng.integers(1, LENGTH - width))
            positions[i] += torch.from_numpy((far.cumsum() / max(far.sum(), 1e-9) * spare).astype(int))
    return Batch(ids, weights, positions, torch.tensor(known, dtype=torch.long).reshape(-1, 4))


def _joined(row: Row) -> Row:
    out: list[Piece] = []
    for piece in row:
        if out and out[-1].text == " ":
            out[-1] = piece._replace(text=" " + piece.text)
        else:
            out.append(piece)
    return tuple(out)


def train(directory: Path, settings: Training | None = None, data: Path | None = None, log: Any = sys.stderr) -> Path:
    """Train into ``directory`` and return the folder of the finished model, ``directory/model``.

    A directory that holds an unfinished training with the same settings is gone on with. ``data``: the folder of
    ordinary text; without it the model reads nothing but what the world wrote, which the log says.
    """
    s = settings or Training()
    lines = corpus.ordinary(data)
    if not lines:
        print("no ordinary text: the model will read only what this world writes", file=log, flush=True)
        s = replace(s, data=False)
    open_training(directory, s)
    texts = Texts(s, lines)
    tokenizer = train_tokenizer(_sample(texts))
    model = build_llama(tokenizer, seed_of("facts", s.seed) % 2**31)
    learn(model, tokenizer, texts, directory, log)
    return keep(model, tokenizer, directory)


def open_training(directory: Path, s: Any) -> None:
    """Make the directory and its record of settings. Raises RunError where it holds a training with other ones."""
    directory.mkdir(parents=True, exist_ok=True)
    record = directory / "training.json"
    if record.exists() and (found := json.loads(record.read_text())) != asdict(s):
        changed = ", ".join(f"{k} {found.get(k)!r}" for k, v in asdict(s).items() if found.get(k) != v)
        raise RunError(
            f"train facts into {directory}", f"a training with other settings: {changed}", "another --out directory"
        )
    record.write_text(json.dumps(asdict(s)))


def keep(model: Any, tokenizer: Any, directory: Path) -> Path:
    """Write the finished model, in half precision, to ``directory/model``: whole or not at all."""
    fresh, final = directory / "model.part", directory / "model"
    shutil.rmtree(fresh, ignore_errors=True)
    model.to(torch.float16).save_pretrained(fresh, safe_serialization=True)
    tokenizer.save_pretrained(fresh)
    shutil.rmtree(final, ignore_errors=True)
    fresh.rename(final)
    return final


def _sample(texts: Texts) -> list[str]:
    """What the tokenizer is trained on: the world's words often enough to be whole tokens."""
    rng = stream("facts", texts.s.seed, "tokenizer")
    # The documents hold the towns, so that the questions asked after scenes add no word.
    written = ["".join(piece.text for piece in texts.row(rng, LATE - 0.01)) for _ in range(20_000)]
    return written + [d.text for d in texts.documents] * 4


def learn(model: Any, tokenizer: Any, texts: Texts, directory: Path, log: Any) -> None:
    """Train a model on rows of ``texts``, with heads on its middle layer; its weights become their moving average."""
    s, width = texts.s, model.config.hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("facts", s.seed, "heads") % 2**31)
        heads = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in HEADS)
    # The output layer is the embedding, so that the inner model holds all weights.
    t = Trainee(
        {"model": model.model, "heads": heads}, directory / "model.safetensors", s.steps, s.learning_rate, s.checkpoint
    )
    table = model.get_input_embeddings().weight
    middle = model.config.num_hidden_layers // 2
    running: dict[str, float] = {}
    for step in steps(t, "facts", log):
        rng, done = stream("facts", s.seed, "rows", step), step / s.steps
        rows = sorted((texts.row(rng, done) for _ in range(s.batch)), key=lambda r: sum(len(p.text) for p in r))
        found, aided = [], []
        for part in np.array_split(np.arange(s.batch), 3):  # rows of like length are padded less
            b = encode(tokenizer, [rows[i] for i in part], rng, 0.0 if done < 2 * EARLY else 0.4)
            out = model.model(input_ids=b.ids, position_ids=b.positions, use_cache=False, output_hidden_states=True)
            wanted = b.weights[:, 1:] > 0
            found.append((out.last_hidden_state[:, :-1][wanted], b.ids[:, 1:][wanted], b.weights[:, 1:][wanted]))
            row, place, head, word = b.known.T
            inside = out.hidden_states[middle][row, place]
            read = torch.stack([h(inside) for h in heads], 1)[torch.arange(len(head)), head]
            aided.append((read, word))
        states, target, share = (torch.cat(x) for x in zip(*found, strict=True))
        read, word = (torch.cat(x) for x in zip(*aided, strict=True))
        said = states @ table.T
        each = nn.functional.cross_entropy(said, target, reduction="none")
        aid = nn.functional.cross_entropy(read @ table.T, word)
        t.update((each * share).sum() / share.sum() + AIDED * aid)
        right = (said.argmax(-1) == target).float()
        value = share == VALUE
        now = {"value": right[value].mean().item(), "other": each[~value].mean().item(), "aid": aid.item()}
        running = {k: 0.98 * running.get(k, v) + 0.02 * v for k, v in now.items()}
        if t.step % 100 == 0:
            print(
                f"values right {running['value']:.3f}, other loss {running['other']:.3f}, heads {running['aid']:.3f}",
                file=log, flush=True,
            )  # fmt: skip
    t.use_average()
