"""Reading: an answer, the passages it was written from, and the ranking that chose them.

A retriever ranks a collection once. Passages can then be passed over or edited and the answer written anew, while the
ranking stays as it was: nothing is indexed again, so that what changes in the answer comes from the passages.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from .errors import PromptError, RunError
from .segments import Segments, split

if TYPE_CHECKING:
    from .explanation import Explanation
    from .text import TextModel, TextRun

Span = tuple[int, int]
FRAME = "{passages}\n\nQuestion: {question}\nAnswer:"
BETWEEN = "\n\n"
"""What stands between passages."""
_NOTHING: Mapping[int, str] = MappingProxyType({})


@dataclass(frozen=True)
class Passage:
    """A text that can be found, and what a person calls it."""

    text: str
    name: str = ""


@dataclass(frozen=True)
class Ranking:
    """A whole collection ranked for one question: numbers of passages, the best first, and the score of each.

    ``found``: how many of them have to do with the question at all; ``by``: the retriever."""

    order: tuple[int, ...]
    scores: tuple[float, ...]
    found: int
    by: str

    def best(self, top_k: int, hidden: Collection[int] = ()) -> tuple[int, ...]:
        """The first ``top_k`` found ones, passing over hidden ones. All others keep order and score."""
        return tuple(i for i in self.order[: self.found] if i not in hidden)[:top_k]


class Retriever(Protocol):
    """Ranks a fixed collection of passages."""

    @property
    def passages(self) -> Sequence[Passage]:
        """The collection."""

    def rank(self, question: str) -> Ranking:
        """All passages, the best first."""


@dataclass(frozen=True)
class Cited:
    """Part of a passage that an answer is put down to: characters [start, end) of passage ``number`` of the collection,
    which was found at ``rank`` (from 1), and the score of the explanation."""

    number: int
    rank: int
    name: str
    start: int
    end: int
    text: str
    score: float = 0.0

    def __str__(self) -> str:
        called = self.name or f"passage {self.number}"
        return f"{called} (rank {self.rank}), characters {self.start} to {self.end}: {self.text!r}"


@dataclass(frozen=True)
class Asked:
    """A question whose answer is known. ``values``: others that could stand in the answer's place; ``gold``: numbers of
    passages that were written for it; ``kind``: "answered" (they are in the collection), "gone" (they are there and
    kept from the reader) or "foreign" (asked of another collection)."""

    question: str
    answer: str
    values: tuple[str, ...] = ()
    gold: tuple[int, ...] = ()
    kind: str = "answered"


@dataclass(frozen=True)
class Reading:
    """What a model wrote after ``asked`` and the best passages of ``ranking``.

    ``read``: numbers of the passages in the prompt, in its order; ``spans``: their characters in ``run.prompt``.
    ``texts``: the passages as they were read, by number, where they were edited. ``top_k``, ``frame``: as given.
    """

    run: TextRun
    asked: str
    passages: tuple[Passage, ...]
    ranking: Ranking
    read: tuple[int, ...]
    spans: tuple[Span, ...]
    top_k: int
    frame: str = FRAME
    texts: Mapping[int, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What was written."""
        return self.run.text

    @property
    def model(self) -> TextModel:
        """The live model. Raises RunError where there is none."""
        if self.run.model is None:
            raise RunError("ask the reader again", "this Reading has no live model", "load the model and read")
        return self.run.model

    def segments(self) -> Segments:
        """The tree of the prompt's parts. All but the passages is protected."""
        prompt, tokens = self.run.prompt, [(int(a), int(b)) for a, b in self.run.prompt_spans]
        if not self.spans:
            raise PromptError(f"the evidence of {self.text!r}", "no passage was read", "a question that finds passages")
        ends = [0, *(x for span in self.spans for x in span), len(prompt)]
        rest = [(a, b) for a, b in zip(ends[::2], ends[1::2], strict=True) if prompt[a:b].strip()]
        return split(prompt, sorted((*self.spans, *rest)), rest, tokens)

    def about(self, span: str | Span | None = None, level: str = "sentence", **choices: Any) -> Any:
        """The TextQuestion "what in these passages made the model write this span?" (None: all of its answer)."""
        tokens = self.run.tokens_of(span)
        return self.model.question(self.run, self.segments(), level=level, tokens=tokens, **choices)

    def cited(self, start: int, end: int, score: float = 0.0) -> Cited:
        """Characters [start, end) of the prompt as part of a passage. Raises PromptError for what lies in none."""
        for number, (a, b) in zip(self.read, self.spans, strict=True):
            if a <= start < end <= b:
                rank = self.ranking.order.index(number) + 1
                name, text = self.passages[number].name, self.run.prompt[start:end]
                return Cited(number, rank, name, start - a, end - a, text, score)
        raise PromptError(f"characters {start} to {end} of the prompt", "they lie in no passage", str(self.spans))

    def evidence(self, explanation: Explanation, most: int = 3) -> list[Cited]:
        """Passage and span of the units with the highest scores."""
        order = sorted(range(len(explanation.units)), key=lambda i: -explanation.totals[i])[:most]
        spans = [explanation.units.members[i][0] for i in order]
        return [self.cited(a, b, float(explanation.totals[i])) for i, (a, b) in zip(order, spans, strict=True)]

    def again(self, edits: Mapping[int, str] = _NOTHING, hidden: Collection[int] = (), refill: bool = True) -> Reading:
        """Write anew with some passages edited where they stand ({number: text}; "": the place stays empty) and some
        hidden. The ranking is the same; hidden ones are passed over, and with ``refill`` the next in it take their
        places."""
        numbers = self.ranking.best(self.top_k, hidden) if refill else tuple(i for i in self.read if i not in hidden)
        changed = dict(self.texts) | dict(edits)
        numbers = tuple(i for i in numbers if changed.get(i, self.passages[i].text).strip())
        texts = [changed.get(i, self.passages[i].text) for i in numbers]
        prompt, spans = assembled(texts, self.asked, self.frame)
        run = self.model.write(replace(self.run.settings, prompt=prompt, forced=""))
        return replace(self, run=run, read=numbers, spans=located(run, prompt, spans), texts=changed)

    def __str__(self) -> str:
        lines = [f"{self.asked} {self.text.strip()!r}, by {self.run.model_name} after {len(self.read)} passages"]
        for number in self.read:
            rank = self.ranking.order.index(number)
            name = self.passages[number].name or f"passage {number}"
            lines.append(f"  {rank + 1}. {name} ({self.ranking.by} {self.ranking.scores[rank]:.2f})")
        return "\n".join(lines)


def assembled(texts: Sequence[str], question: str, frame: str = FRAME) -> tuple[str, tuple[Span, ...]]:
    """The prompt, and the characters of each passage in it.

    >>> assembled(["One.", "Two."], "Who?", "{passages} {question}")
    ('One.\\n\\nTwo. Who?', ((0, 4), (6, 10)))
    """
    if frame.count("{passages}") != 1 or frame.count("{question}") != 1:
        raise PromptError(f"the frame {frame!r}", "it does not name both parts once", repr(FRAME))
    before, after = (part.replace("{question}", question) for part in frame.split("{passages}"))
    prompt, spans = before, []
    for i, text in enumerate(texts):
        prompt += BETWEEN if i else ""
        spans.append((len(prompt), len(prompt) + len(text)))
        prompt += text
    return prompt + (after if texts or before else after.lstrip()), tuple(spans)


def located(run: TextRun, prompt: str, spans: Sequence[Span]) -> tuple[Span, ...]:
    """Spans of an assembled prompt in what the model read, which may have a chat template around it."""
    offset = run.prompt.find(prompt.strip())
    if offset < 0:
        raise PromptError("the passages of the prompt", "the chat template changes its text", "no template")
    offset -= len(prompt) - len(prompt.lstrip())
    return tuple((a + offset, b + offset) for a, b in spans)


def passages_from(path: Path) -> list[Passage]:
    """The passages of a file of JSON lines, {"text": ..., "name": ...}. Raises PromptError with the line's number."""
    asked = f"the passages of {path}"
    try:
        lines = path.read_text(encoding="utf8").split("\n")
    except OSError as error:
        raise PromptError(asked, error.strerror or str(error), "a file that can be read") from None
    except UnicodeDecodeError:
        raise PromptError(asked, "it is no text in UTF-8", 'lines such as {"text": "...", "name": "..."}') from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise PromptError(asked, f"line {number} has no text", 'lines such as {"text": "...", "name": "..."}')
        found.append(Passage(text.strip(), str(row.get("name", "")) if row else ""))
    if not found:
        raise PromptError(asked, "it is empty", 'lines such as {"text": "...", "name": "..."}')
    return found
