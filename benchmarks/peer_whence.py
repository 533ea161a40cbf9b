"""Our side of text_attribution, run in turn with the peers: the same questions, through what a user would call."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.peer_turns import Works, serve, task_of


def make(folder: str) -> Works:
    # Loaded by the methods when first used; the peers load theirs at the start.

    import whence.models.text_question  # noqa: F401
    from whence.ablations.leave_one_out import LeaveOneOut
    from whence.engine.ablate import MEGABYTES, Ablation, Version
    from whence.inputs.context_cite import ContextCite
    from whence.models.kept_states import KeptStates
    from whence.models.text_loading import load_text
    from whence.segments import split
    from whence.text import TextSettings

    adapter, task = load_text(folder, "cpu"), task_of(folder)
    model = adapter.model
    run = adapter.write(TextSettings(task["prompt"], forced=task["target"]))
    n, targets = len(run.prompt_ids), len(run.output_ids)
    each_once = np.concatenate([np.ones((1, n), bool), ~np.eye(n, dtype=bool)])

    asking = f"Context: {task['context']}\n\nQuery: {task['query']}"
    answer = adapter.write(TextSettings(asking, forced=task["target"], template=True))
    start = answer.prompt.index(task["context"])
    stop = start + len(task["context"])

    def of_tokens(megabytes: float = MEGABYTES) -> Any:
        parts = split(run.prompt, tokens=run.prompt_spans.tolist())
        return adapter.question(run, parts, level="token", megabytes=megabytes)

    def of_sentences(megabytes: float = MEGABYTES) -> Any:
        parts = split(answer.prompt, [(start, stop)], [(0, start), (stop, len(answer.prompt))])
        return adapter.question(answer, parts, megabytes=megabytes)

    # -- against peers ------------------------------------------------------------------------------------------------

    def leave_one_out() -> Mapping[str, Any]:
        said = of_tokens().ask_tokens(each_once)
        return {"scores": said[0] - said[1:]}

    def cite() -> Mapping[str, Any]:
        found = ContextCite(ablations=64, target="response").explain(of_sentences())
        return {"weights": found.scores, "asked": found.cost.runs}

    def ablations(seeds: range) -> Any:
        """As context-cite draws them."""
        count, p = len(task["sentences"]), [0.5, 0.5]
        return np.array([np.random.RandomState(s).choice([False, True], count, p=p) for s in seeds])

    def cite_bare() -> Mapping[str, Any]:
        """The peer's own 64 ablations, and its lasso: what the engine alone saves."""
        from sklearn.linear_model import Lasso

        z = ablations(range(64))
        said = of_sentences().ask_tokens(z)
        x = (z - z.mean(0)) / z.std(0)
        fit = Lasso(alpha=0.01).fit(x, _logit(said.sum(1)) / targets)
        return {"weights": fit.coef_ / z.std(0) * targets, "masks": z, "logits": _logit(said), "asked": len(z)}

    def held_out() -> Mapping[str, Any]:
        z = ablations(range(1000, 1064))
        return {"masks": z, "values": _logit(of_sentences().ask_tokens(z).sum(1))}

    def gradients() -> Mapping[str, Any]:
        """One pass, and a backward for each target token."""
        asked = of_tokens()
        return {"scores": _times_input(asked.slopes(), asked.inputs)}

    def gradients_one_by_one() -> Mapping[str, Any]:
        """The question of one target token after the other: a pass and a backward for each."""
        asked = of_tokens()
        x = asked.inputs.requires_grad_()
        one_by_one = (asked.over(t, t + 1) for t in range(targets))
        return {"scores": _times_input([torch.autograd.grad(q.forward(x)[0], x)[0][0] for q in one_by_one], x)}

    def _times_input(slopes: Any, x: torch.Tensor) -> Any:
        return np.stack([(g * x[0])[:n].sum(-1).detach().numpy() for g in slopes], 1)

    # -- exactness ----------------------------------------------------------------------------------------------------

    def versions() -> Sequence[Version]:
        tokens, sentences = of_tokens(), of_sentences()
        return [*map(tokens.version, each_once), *map(sentences.version, ablations(range(64)))]

    def exact() -> Mapping[str, Any]:
        """The engine's largest difference from one plain pass per version: no kept states, all logits."""
        asked, worst = versions(), 0.0
        for version, found in zip(asked, Ablation(model, keeper=KeptStates.of(model)).logprobs(asked), strict=True):
            worst = max(worst, float(abs(found - _plain(model, version)).max()))
        return {"worst": worst, "versions": len(asked)}

    # -- one pass, for memory -----------------------------------------------------------------------------------------

    one = Version(tuple(run.prompt_ids.tolist()), tuple(run.output_ids.tolist()))

    def forward() -> Mapping[str, Any]:
        return {"said": Ablation(model).logprobs([one])[0]}

    def forward_all_logits() -> Mapping[str, Any]:
        return {"said": _plain(model, one)}

    def turned_down(rows: int) -> Mapping[str, Any]:
        asked = of_sentences(megabytes=0.001)  # passes of one row
        return {"said": asked.suppress(np.where(np.eye(len(asked.units), dtype=bool), 0.1, 1.0)[:rows])}

    def gradient() -> Mapping[str, Any]:
        asked = of_tokens()
        x = asked.inputs.requires_grad_()
        return {"grad": torch.autograd.grad(asked.forward(x)[0], x)[0]}

    def long() -> Mapping[str, Any]:
        return {"scores": LeaveOneOut(draws=1).explain(of_sentences()).scores, "tokens": len(answer.prompt_ids)}

    return {
        "leave one out": leave_one_out, "context-cite": cite, "the same 64": cite_bare, "held out": held_out,
        "gradients": gradients, "gradients one by one": gradients_one_by_one, "exact": exact, "forward": forward,
        "forward, all logits": forward_all_logits, "one unit turned down": lambda: turned_down(1),
        "every unit turned down": lambda: turned_down(len(task["sentences"])), "gradient": gradient, "long": long,
    }  # fmt: skip


def _plain(model: Any, version: Any) -> Any:
    with torch.inference_mode():
        said = model(input_ids=torch.tensor([version.ids]), use_cache=False).logits[0].log_softmax(-1)
    first = len(version.prompt) - 1
    return said[range(first, first + len(version.target)), list(version.target)].numpy()


def _logit(logp: Any) -> Any:
    return logp - np.log(-np.expm1(logp))


if __name__ == "__main__":
    import whence

    serve(make, f"whence {whence.__version__}")
