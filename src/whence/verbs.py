"""The verbs: load a model, explain a run, put methods on trial."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import MethodError
from .method import card_of
from .method import load as load_method

if TYPE_CHECKING:
    from .explanation import Explanation


def load(model: Any = None) -> Any:
    """The adapter of a model: a pipeline directory, a hub id or a live diffusers pipeline; None or "shapes": the
    embedded one, "emoji": the embedded one of real pictures.

    Raises ModelError where there is no pipeline that an adapter knows, or only a pickle.
    """
    from .models.loading import load as load_pipeline

    if model not in (None, "emoji", "shapes"):
        return load_pipeline(model)
    from .worlds import emoji, shapes

    adapter = load_pipeline((emoji if model == "emoji" else shapes).model_directory())
    adapter.name = f"{model or 'shapes'}, the embedded model"
    return adapter


def load_text(model: Any = "facts") -> Any:
    """The adapter of a language model: a transformers directory or a hub id; "facts": the embedded one.

    Raises ModelError where there is no such model, or only a pickle.
    """
    from .models.text_loading import load_text as load_directory

    if model != "facts":
        return load_directory(model)
    from .worlds.facts import model_directory

    adapter = load_directory(model_directory())
    adapter.name = "facts, the embedded model"
    return adapter


def explainer(by: str) -> Any:
    """A method with its default settings as a function of a run or a question. One of training examples makes its pass
    over them once, and asks what it kept for each output."""
    method = load_method(by)()
    if hasattr(method, "explain"):
        return method.explain
    known: dict[tuple[str, str], Any] = {}

    def explain(question: Any) -> Any:
        if "training examples" not in question.capabilities:
            raise MethodError(
                f"{by} of this question",
                f"it offers {sorted(question.capabilities)}",
                "a question with training examples",
            )
        key = (question.objective.fingerprint(), question.examples.fingerprint())
        if key not in known:
            known.clear()  # questions come model by model; what was kept of the last one is not needed again
            known[key] = method.fit(question.objective, question.examples)
        return known[key].explain(question.query)

    return explain


def passes(by: str, question: Any) -> int:
    """How many forwards a method will ask of a question, as far as it knows beforehand."""
    verb = load_method(by)
    counts = getattr(verb(), "rows", None)
    return int(counts(len(question.units))) if counts else len(question.units)


def explain(run: Any, by: str = "daam", **settings: Any) -> Explanation:
    """Explain a run (a picture) or a question by the method of this name: ``explain(run, by="daam", threshold=.3)``."""
    card = card_of(by)
    verb = load_method(by)
    if not hasattr(verb, "explain"):
        passes = {"influence": "training examples first (whence index)", "latents": "a bank of pictures first"}
        room = card.module.split(".")[1]
        kinds = {
            "write": "writes a text", "plan": "edits a model", "steer": "steers a picture",
            "fit": f"makes a pass over {passes.get(room, 'pictures first')}",
        }  # fmt: skip
        kind = next((says for has, says in kinds.items() if hasattr(verb, has)), "is a check")
        raise MethodError(f"explain by {by!r}", f"{by} {kind}, it explains none", f"whence.method.load({by!r})")
    try:
        method = verb(**settings)
    except TypeError as error:
        raise MethodError(f"{card.name} with {settings}", str(error), str(verb.__doc__)) from None
    return method.explain(run)  # type: ignore[no-any-return]
