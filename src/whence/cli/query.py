"""`whence query`: which training examples an output came from, by an index, and how far to trust the answer."""

from __future__ import annotations

import json as to_json
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PromptError, RunError
from .spans import span_of

if TYPE_CHECKING:
    from ..store.checkpoints import Checkpoints


@dataclass(frozen=True)
class Asked:
    """The options of the command as typed."""

    index: str
    run: Path | None = None
    prompt: str = ""
    text: str = ""
    seed: int | None = None
    max_tokens: int = 32
    top: int = 10
    both_ends: bool = False
    verify: bool = False
    out: Path | None = None
    exact: int | None = None
    span: str | None = None
    per_token: bool = False
    ray: str | None = None


def query(asked: Asked, json: bool) -> None:
    """Make the output (or take the one of a report), ask the index and print the answer. Raises the errors of the
    first thing that does not fit, before the model is loaded where that is possible."""
    from ..store import Index
    from ..store.checkpoints import Checkpoints, places
    from ..store.training_index import judgement, opened
    from .index import workers_of
    from .training_set import subject

    if bool(asked.prompt) == bool(asked.run):
        raise PromptError(
            "a query",
            "--prompt and a report's folder: one of them is needed",
            'whence query IX --prompt "a red circle"',
        )
    if asked.exact is not None and asked.exact < 0:
        raise RunError(f"--exact {asked.exact}", "less than none", "0 or more")
    if asked.top < 1:
        raise RunError(f"--top {asked.top}", "nothing to show", "1 or more")
    asked = _with_run(asked)
    held = Index.open(asked.index)
    about = held.manifest.settings.get("about")
    if not about:
        raise RunError(
            f"ask the index {asked.index}", "it does not say what it was built of", "one that `whence index` built"
        )
    workers = None if asked.ray is None else workers_of(asked.ray, about)
    it = subject(about)
    others = [subject({**it.about, "model": m, "checkpoints": []}) for m in it.about["checkpoints"]]
    with ExitStack() as stack:
        where = zip(places(asked.index, 1 + len(others)), (it, *others), strict=True)
        whole = Checkpoints(tuple(stack.enter_context(opened(p, s.objective, it.examples)) for p, s in where))
        index = whole.members[0]
        made, example, said = _output(it, asked)
        began = time.monotonic()
        found = whole.search([example], asked.top, asked.exact, workers)[0]
        seconds = time.monotonic() - began
        label = it.examples.label
        verdicts = _verified(it, found, example) if asked.verify else []
        record: dict[str, Any] = {
            "schema": "whence/query/1", "method": index.form.name, "index": asked.index,
            "model": it.adapter.name, "checkpoints": len(whole.members), **said,
            "examples": found.scanned, "scored_again": found.again, "scored_by_ekfac": found.exact,
            "seconds": round(seconds, 3),
            "top": [{"example": int(n), "label": label(int(n)), "score": float(s)}
                    for n, s in zip(found.numbers, found.scores, strict=True)],
            "trust": {
                "recall_of_first_stage": found.recall, "on_examples": found.slice,
                "agreement_with_ekfac": {j.form: {"ndcg_at_20": round(j.ndcg, 3), "spearman": round(j.spearman, 3)}
                                         for j in judgement(index.index) if j.form.split(":")[0] == index.form.name},
            },
            "notes": list(index.fitted.notes),
        }  # fmt: skip
        if asked.both_ends:
            record["lowest"] = [
                {"example": int(n), "label": label(int(n)), "score": float(s)}
                for n, s in zip(found.low_numbers, found.low_scores, strict=True)
            ]
        if asked.per_token:
            record["tokens"] = _token_by_token(whole, made, label, workers)
        if verdicts:
            record["verdicts"] = [v.record() for v in verdicts]
        if asked.out:
            from ..report.query_page import QueryBundle, write_query

            picture = None if it.writes else made.images[0]
            page = QueryBundle(record, it.examples, picture, verdicts, ["whence", *sys.argv[1:]])
            record["report"] = str(write_query(page, asked.out))
        print(to_json.dumps(record, indent=1) if json else _lines(record))
        sys.stdout.flush()


def _with_run(asked: Asked) -> Asked:
    """What was asked for in the report of an earlier `whence explain`."""
    if asked.run is None:
        return asked
    for name in ("explanation.json", "report.json"):
        path = asked.run / name if asked.run.is_dir() else asked.run
        if path.is_file() and path.name == name:
            try:
                said = to_json.loads(path.read_text(encoding="utf8"))["run"]
                settings = said["settings"]
                return replace(asked, prompt=settings["prompt"], seed=settings.get("seed"), text=said.get("text", ""))
            except (ValueError, KeyError, TypeError) as error:
                raise RunError(
                    f"the run of {path}", f"{type(error).__name__}: {error}", "a report of `whence explain`"
                ) from None
    raise RunError(f"the run {asked.run}", "no report is there", "a folder that `whence explain --out` wrote")


def _output(it: Any, asked: Asked) -> tuple[Any, Any, dict[str, Any]]:
    """The run, the example that it makes, and what the record says of it."""
    if it.writes:
        from ..text import TextSettings

        run = it.adapter.write(TextSettings(asked.prompt, asked.max_tokens, asked.seed, forced=asked.text))
        said = {"prompt": run.prompt, "text": run.text, "seed": asked.seed}
        if asked.span is None:
            return run, (run.prompt, run.text), said
        tokens = run.tokens_of(span_of(asked.span))
        piece = _piece(run, int(run.output_spans[tokens[0], 0]), int(run.output_spans[tokens[-1], 1]))
        return run, piece, said | {"span": run.text[piece.start : piece.stop]}
    for option, given in (("--text", asked.text), ("--span", asked.span), ("--per-token", asked.per_token)):
        if given:
            raise RunError(option, f"{it.adapter.name} makes pictures", f"no {option}")
    run = it.adapter.picture(asked.prompt, seed=asked.seed or 0)
    return run, (asked.prompt, run.latents[0]), {"prompt": asked.prompt, "seed": run.settings.seed}


def _piece(run: Any, start: int, stop: int) -> Any:
    from ..models.objectives import Piece

    return Piece(run.prompt, run.text, start, stop)


def _token_by_token(index: Checkpoints, run: Any, label: Any, workers: Any) -> list[dict[str, Any]]:
    """For each token that was written the examples that its own loss leads to; all of them in one scan."""
    spans = [(int(a), int(b)) for a, b in run.output_spans if a < b]
    found = index.search([_piece(run, a, b) for a, b in spans], 3, 0, workers)
    return [
        {
            "token": run.text[a:b],
            "top": [{"example": int(n), "label": label(int(n)), "score": float(s)}
                    for n, s in zip(f.numbers, f.scores, strict=True)],
        }
        for (a, b), f in zip(spans, found, strict=True)
    ]  # fmt: skip


def _verified(it: Any, found: Any, example: Any) -> list[Any]:
    from ..checks.tail_patch import tail_patch

    return [tail_patch(found.numbers, it.objective, it.examples, example)]


def _lines(record: dict[str, Any]) -> str:
    said = f" -> {record['text']!r}" if "text" in record else ""
    said += f", of which {record['span']!r}" if "span" in record else ""
    lines = [f"{record['prompt']!r}{said}"]
    for name in ("top", "lowest"):
        rows = record.get(name, [])
        lines += [f"{name} of {record['examples']} training examples"] if rows else []
        lines += [f"  {r['score']:+.3e}  #{r['example']:<6} {r['label']}" for r in rows]
    for row in record.get("tokens", []):
        best = row["top"][0]
        lines.append(f"  {row['token']!r:14} {best['score']:+.3e}  #{best['example']:<6} {best['label']}")
    trust = record["trust"]
    if record["scored_by_ekfac"]:
        lines.append(f"{record['scored_by_ekfac']} of them were scored once more by EK-FAC, these are its scores")
    if trust["recall_of_first_stage"] is not None:
        share, part = trust["recall_of_first_stage"], trust["on_examples"]
        lines.append(f"the first stage let {share:.0%} of the best through, measured on {part} examples")
    for form, values in trust["agreement_with_ekfac"].items():
        lines.append(f"agreement of {form} with EK-FAC: NDCG@20 {values['ndcg_at_20']}, Spearman {values['spearman']}")
    lines += [f"verdict: {v['word']}: {v['claim']}" for v in record.get("verdicts", [])]
    lines += [record["report"]] if "report" in record else []
    return "\n".join([*lines, f"{record['seconds']} s", *record["notes"]])
