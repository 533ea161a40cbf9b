"""`whence explain` for text: what a language model wrote, where it came from, and each claim on trial.

Everything that can be refused is refused before the model is loaded: files, method names, the output folder.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MethodError, PromptError, RunError
from ..method import Card, card_of, catalogue
from ..segments import LEVELS, Segments, split
from ..text import TextSettings
from .explain_reading import answered, checked_library, named, tried, typed
from .spans import span_of

if TYPE_CHECKING:
    from ..explanation import Explanation
    from ..reading import Passage
    from ..report.text_bundle import TextBundle, Toggle
    from ..text import TextRun

SERVED = "context_cite", "leave_one_out"
"""Methods that are asked where none is named."""
_ASKS = frozenset(
    ("ask", "generate, or ask", "gradients", "attention", "suppression", "logit parts", "implicit attention", "reword")
)
"""What methods need that a question about a text can offer."""
PART = ".part.jsonl"
"""Behind the name of the report: what was measured so far, until the report is whole."""
TOGGLES = 24
"""Sources without which the model writes anew, at most: the ones with the highest scores."""


@dataclass(frozen=True)
class Asked:
    """The options of the command as typed."""

    model: str
    prompt: str = ""
    prompt_file: Path | None = None
    context: Sequence[Path] = ()
    span: str | None = None
    units: str = "sentence"
    by: str | None = None
    max_tokens: int = 32
    seed: int | None = None
    template: bool = False
    question: str = ""
    passages: Path | None = None
    top_k: int = 5
    values: str | None = None

    def checked(self) -> Checked:
        """The same as values. Raises the error of the first option that cannot be served."""
        library = checked_library(self)
        if library is None and bool(self.prompt) == bool(self.prompt_file):
            found = "both" if self.prompt else "neither"
            raise PromptError("a prompt", f"{found} of --prompt and --prompt-file", "one of them")
        said = self.question or self.prompt or _read(self.prompt_file)
        if not said.strip():
            raise PromptError(f"the prompt of {self.prompt_file or '--prompt'}", "it is empty", "at least one word")
        if self.units not in LEVELS[1:]:
            raise PromptError(f"--units {self.units}", "no such level", ", ".join(LEVELS[1:]))
        names = [n.strip() for n in self.by.split(",")] if self.by is not None else list(SERVED)
        for name in names:
            card = card_of(name)
            if card.module.startswith("whence.checks") or not explains_text(card):
                able = [c.name for c in catalogue().values() if explains_text(c)]
                raise MethodError(f"--by {name}", "it scores no parts of a text", ", ".join(able))
        prompt, passages, question = assemble([_read(f) for f in self.context], said)
        return Checked(prompt, tuple(passages), question, tuple(dict.fromkeys(names)), library)


@dataclass(frozen=True)
class Checked:
    """Options whose form is right: the whole prompt, the characters of its passages, those of the question; with
    ``library`` the prompt is written when passages were found in it."""

    prompt: str
    passages: tuple[tuple[int, int], ...]
    question: tuple[int, int] | None
    methods: tuple[str, ...]
    library: Sequence[Passage] | None = None


def is_text(
    model: str | None, prompt_file: Path | None, context: Sequence[Path], span: str | None, question: str = ""
) -> bool:
    """Whether a text is asked for: by the model, or by an option that only text has."""
    if model == "facts" or prompt_file or context or span is not None or question:
        return True
    return model is not None and (Path(model) / "config.json").is_file()


def explains_text(card: Card) -> bool:
    """Whether a method scores the parts of a prompt."""
    room = card.module.split(".")[1]
    return room in ("inputs", "ablations") and bool(_ASKS & set(card.needs))


def _read(path: Path | None) -> str:
    assert path is not None
    try:
        return path.read_text(encoding="utf8").rstrip("\n")
    except UnicodeDecodeError:
        raise PromptError(f"the file {path}", "it is no text in UTF-8", "a plain text file") from None
    except OSError as error:
        raise PromptError(f"the file {path}", error.strerror or str(error), "a text file that can be read") from None


def assemble(contexts: Sequence[str], said: str) -> tuple[str, list[tuple[int, int]], tuple[int, int] | None]:
    """The whole prompt, the characters of each passage, and those of the question, which is never removed.

    Contexts are passages, with an empty line after each, and what is said is the question. Without contexts the
    question is what stands after the last empty line; a text without one has no question, and all of it may be removed.
    """
    if not contexts:
        cut = [m.end() for m in re.finditer(r"\n[ \t]*\n\s*", said)]
        return said, [], (cut[-1], len(said)) if cut else None
    prompt, passages = "", []
    for text in contexts:
        passages.append((len(prompt), len(prompt) + len(text.rstrip())))
        prompt += text.rstrip() + "\n\n"
    return prompt + said, passages, (len(prompt), len(prompt) + len(said))


def explain(asked: Asked, out: Path, json: bool) -> None:
    """Run the command and print: JSON alone, or a table (standard error) and the report's path."""
    checked = asked.checked()
    from ..report.folder import check_folder

    folder = check_folder(out)
    kept = folder.with_name(folder.name + PART)
    try:
        bundle = make(asked, checked, kept)
    except KeyboardInterrupt:
        if kept.exists():
            print(f"stopped; what was measured is in {kept}, and the same command goes on from there", file=sys.stderr)
        raise
    from ..report.text_bundle import write_text_report

    write_text_report(bundle, folder)
    kept.unlink(missing_ok=True)
    if json:
        print(bundle.json())
        return
    from .text_table import print_text_table

    print_text_table(bundle)
    print(folder / "report.html")


def tree_of(checked: Checked, run: TextRun) -> Segments:
    """The parts of what the model read. A chat template around the prompt is protected with the question."""
    offset = run.prompt.find(checked.prompt)
    if offset < 0:
        raise PromptError("the parts of the prompt", "the chat template changes its text", "no --template")
    passages = [(a + offset, b + offset) for a, b in checked.passages]
    fixed = [(0, offset), (offset + len(checked.prompt), len(run.prompt))]
    if checked.question:
        fixed.append((checked.question[0] + offset, checked.question[1] + offset))
        passages = [*passages, fixed[-1]] if passages else []
    tokens = [(int(a), int(b)) for a, b in run.prompt_spans]
    return split(run.prompt, passages, [(a, b) for a, b in fixed if a < b], tokens)


def make(asked: Asked, checked: Checked, kept: Path | None = None) -> TextBundle:
    """Load, write, explain, try, and write anew without each source. ``kept``: where what is measured is kept
    meanwhile."""
    from .. import verbs
    from ..checks.removal import removal, ways
    from ..engine.progress import progress
    from ..report.bundle import Trial
    from ..report.text_bundle import TextBundle

    if sys.stderr.isatty():
        print("loading the model", file=sys.stderr)
    model = verbs.load_text(asked.model)
    settings = TextSettings(checked.prompt, asked.max_tokens, asked.seed, template=asked.template)
    reading = answered(model, asked, checked.library, settings) if checked.library else None
    run = reading.run if reading else model.write(settings)
    tokens = run.tokens_of(None if asked.span is None else span_of(asked.span))
    span = int(run.output_spans[tokens[0], 0]), int(run.output_spans[tokens[-1], 1])
    trial = tried(reading, asked, span) if reading else None
    tree = reading.segments() if reading else tree_of(checked, run)
    question = model.question(run, tree, level=asked.units, tokens=tokens, kept=kept)
    explanations: list[Explanation] = []
    for name in checked.methods:
        with progress(name, total=verbs.passes(name, question), unit="passes") as advance:
            question.advance = advance
            explanations.append(verbs.explain(question, name))
    trials = []
    with progress("trial", total=len(question.units) * len(ways(question)), unit="passes") as advance:
        question.advance = advance
        for e in explanations:
            labels = _best(e)
            trials += [Trial(e.method, u, v) for u, v in zip(labels, removal(e, question, labels), strict=True)]
    explanations = named(explanations, reading, trial) if reading else explanations
    toggles = _toggles(run, question, explanations)
    return TextBundle(run, tree, explanations, span, trials, toggles, _trace(run), _command(asked, checked))


def _best(e: Explanation, most: int = 3) -> list[str]:
    order = sorted(range(len(e.units)), key=lambda i: -e.totals[i])[:most]
    return [e.units.labels[i] for i in order]


def _toggles(run: TextRun, question: Any, explanations: Sequence[Explanation]) -> list[Toggle]:
    """What the model writes without each source, and what the explained words are worth then."""
    import numpy as np

    from ..engine.progress import progress
    from ..report.text_bundle import Toggle

    weight = np.max([np.abs(e.totals) for e in explanations], 0)
    chosen = sorted(np.argsort(-weight, kind="stable")[:TOGGLES].tolist())
    keep = ~np.eye(len(question.units), dtype=bool)
    change = question.ask(keep) - question.ask(np.ones((1, len(question.units)), bool))
    found = []
    with progress("without each source", total=len(chosen), unit="texts") as advance:
        for i in chosen:
            prompt = question.text(keep[i])
            try:
                text = run.again(prompt=prompt, template=False).text if prompt.strip() else ""
            except RunError:
                text = ""
            a, b = question.spans[i]
            found.append(Toggle(question.units.labels[i], a, b, text, float(change[i])))
            advance()
    return found


def _trace(run: TextRun) -> list[dict[str, Any]] | None:
    """How each token was chosen; None where the model cannot be traced."""
    from ..report.text_bundle import trace_rows

    model: Any = run.model
    try:
        found = model.trace(run)
    except MethodError:
        return None
    tokens = [run.text[a:b] for a, b in run.output_spans]
    return trace_rows(found, lambda token: str(model.tokenizer.decode([token])), tokens)


def _command(asked: Asked, checked: Checked) -> str:
    words = [
        "whence", "explain", asked.model,
        *typed(asked),
        *(part for c in asked.context for part in ("--context", str(c))),
        *(["--span", asked.span] if asked.span else []), "--units", asked.units, "--by", ",".join(checked.methods),
        "--max-tokens", str(asked.max_tokens), *(["--seed", str(asked.seed)] if asked.seed is not None else []),
        *(["--template"] if asked.template else []),
    ]  # fmt: skip
    return shlex.join(words)
