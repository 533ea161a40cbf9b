"""`whence explain --question ... --passages ...`: retrieve, read, and name passage and span of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import MethodError, PromptError

if TYPE_CHECKING:
    from ..checks.evidence import Evidence
    from ..explanation import Explanation
    from ..reading import Passage, Reading
    from ..text import TextSettings
    from .explain_text import Asked


def checked_library(asked: Asked) -> list[Passage] | None:
    """The passages to search; None where no question is asked of any. Raises PromptError for options that do not go
    together."""
    from ..reading import passages_from

    if not asked.question and asked.passages is None:
        if asked.values is not None:
            raise PromptError("--values", "there is no --question", "--question, --passages, --span and --values")
        return None
    if asked.passages is None or not asked.question.strip():
        missing = "--passages" if asked.passages is None else "--question"
        raise PromptError("an answer from passages", f"{missing} is missing", "--question and --passages")
    if asked.prompt or asked.prompt_file or asked.context:
        raise PromptError("--question", "a prompt or a context is given too", "--question and --passages alone")
    if asked.top_k < 1:
        raise PromptError(f"--top-k {asked.top_k}", "nothing to read", "1 or more")
    if asked.values is not None and (not asked.span or len(_values(asked)) < 3):
        found = f"{len(_values(asked))} of them" if asked.span else "--span is missing"
        raise MethodError("--values", found, "--span ANSWER and three or more other values, with commas between")
    return passages_from(asked.passages)


def _values(asked: Asked) -> list[str]:
    return [v.strip() for v in (asked.values or "").split(",") if v.strip()]


def answered(model: Any, asked: Asked, library: Sequence[Passage], settings: TextSettings) -> Reading:
    """Retrieve and read."""
    from ..models.reading import read

    s = settings
    return read(
        model, asked.question, library, top_k=asked.top_k, max_tokens=s.max_tokens, seed=s.seed, template=s.template
    )


def tried(reading: Reading, asked: Asked, span: tuple[int, int]) -> Evidence | None:
    """What comes of the evidence's trial; None where no other values are given."""
    from ..checks.evidence import evidence, texts_of
    from ..engine.progress import progress

    if asked.values is None:
        return None
    values = _values(asked)
    with progress("evidence", total=texts_of(values), unit="texts") as advance:
        return evidence(reading, reading.text[span[0] : span[1]].strip(), values, advance=advance)


def named(explanations: Sequence[Explanation], reading: Reading, trial: Evidence | None) -> list[Explanation]:
    """The explanations with passage and span of their best units, and with what came of the trial."""
    record = {"evidence": {"word": trial.word, "verdict": trial.verdict.record()}} if trial else {}
    done = []
    for e in explanations:
        cited = reading.evidence(e)
        notes = [f"cited: {cited[0]}", *(str(trial).splitlines() if trial else [])]
        rows = [
            {"passage": c.number, "name": c.name, "rank": c.rank, "start": c.start, "end": c.end, "score": c.score}
            for c in cited
        ]
        done.append(replace(e, notes=(*e.notes, *notes), details={**e.details, "cited": rows, **record}))
    return done


def typed(asked: Asked) -> list[str]:
    """The options that say what is asked, as typed."""
    if asked.passages is None:
        return ["--prompt-file", str(asked.prompt_file)] if asked.prompt_file else ["--prompt", asked.prompt]
    words = ["--question", asked.question, "--passages", str(asked.passages), "--top-k", str(asked.top_k)]
    return [*words, *(["--values", asked.values] if asked.values else [])]
