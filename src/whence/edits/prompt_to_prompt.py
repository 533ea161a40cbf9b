"""Change a word of the prompt and keep the picture: the new words are drawn where the old ones were.

Prompt-to-prompt (Hertz et al. 2023) makes the picture again with another prompt and the same seed, and writes the
attention of the first into the second. M_t are the cross-attention maps of the source, M*_t those of the target:

    word swap      Edit(M_t, M*_t, t) = M_t where t < tau, else M*_t                                   (section 3.2)
    refinement     (Edit)_ij = (M_t)_i,A(j) where the token j has a place A(j) in the source, else (M*_t)_ij
    re-weighting   (Edit)_ij = c (M_t)_ij for the token j = j*, else (M_t)_ij

and the self-attention maps of the source for the first steps, which hold the layout. The values are always the
target's. A swap of as many tokens is a refinement in which every token has a place, and so is one rule here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

from ..errors import MethodError
from ..method import Card

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.capture import Attention
    from ..run import Run, Settings

CARD = Card(
    name="prompt_to_prompt",
    verb="PromptToPrompt",
    paper="Hertz, Mokady, Tenenbaum, Aberman, Pritch and Cohen-Or, Prompt-to-Prompt Image Editing with Cross-Attention "
    "Control, ICLR 2023",
    systems=("S003-03",),
    question="Can one word of the picture be changed with everything else left where it is?",
    units=("word",),
    works_on=("Stable Diffusion 1 and 2",),
    needs=("cross-attention",),
    cost="two model runs for each picture: the source is made beside the target",
    claim="Pictures with a colour word exchanged show the new colour and keep places, shapes and sizes, more of both "
    "together than the same prompt and seed without the source's attention, or the target's own run with another seed.",
    falsifier={
        "trial": "shapes.swapped.measure",
        "planted": "two-object prompts with one colour exchanged: the oracle reads whether the thing has the new "
        "colour and everything else its place, shape and size",
        "expect": 0.8,
        "control": "the target prompt with the same seed; with another seed; the picture as it was",
        "seconds": 90,
    },
    departs="Words are aligned by their longest common subsequence, an exchanged word takes the place of the one it "
    "stands for. Shares of the steps are settings (the paper's examples: .8 of cross-attention, .4 of self-attention). "
    "No local blending and no inversion of real pictures. Small-scale.",
    avoid="For an edit that needs another layout (an object more, another place): the source's self-attention holds "
    "it.",
)


@dataclass(frozen=True)
class PromptToPrompt:
    """``cross``, ``self_attention``: shares of the steps, from the first, in which the source's maps are written.
    ``weights``: word of the target -> c, which re-weights it."""

    cross: float = 0.8
    self_attention: float = 0.4
    weights: Mapping[str, float] = field(default_factory=dict)

    def steer(self, model: Any, many: Sequence[Settings], prompts: Sequence[str], batch: int = 16) -> list[Run]:
        """Pictures of ``prompts[i]``, drawn over those of ``many[i]``. Raises MethodError, PromptError, RunError before
        any work."""
        from ..engine.attention import AttentionTape
        from ..models.steering import word_number

        if len(many) != len(prompts) or any(s.images != 1 for s in many):
            raise MethodError(f"{len(prompts)} target prompts", f"{len(many)} sources, of one picture each", "one each")
        if not (0 <= self.cross <= 1 and 0 <= self.self_attention <= 1):
            raise MethodError("prompt-to-prompt", f"{self.cross:g} and {self.self_attention:g}", "shares of 0 to 1")
        runs: list[Run] = []
        for start in range(0, len(many), max(batch // 2, 1)):
            part = list(zip(many, prompts, strict=True))[start : start + max(batch // 2, 1)]
            pairs, scales = [], []
            for source, prompt in part:
                ours, target = model.words(source.prompt), model.words(prompt)
                places = list(model.columns(target))
                scale = {c: v for w, v in self.weights.items() for c in places[word_number(w, target.names, prompt)]}
                pairs.append(aligned(ours.names, model.columns(ours), target.names, places))
                scales.append(scale)
            settings = [s for source, prompt in part for s in (source, replace(source, prompt=prompt))]
            calls = model.calls(settings[0])
            tape = AttentionTape(edits=(_Write(pairs, scales, self.cross * calls),))
            with _own_layout(model, len(settings), self.self_attention * calls):
                runs += model.generate_many(settings, tape=tape, batch=len(settings))[1::2]
        return runs


def aligned(
    source: Sequence[str], source_columns: Sequence[Sequence[int]],
    target: Sequence[str], target_columns: Sequence[Sequence[int]],
) -> dict[int, int]:  # fmt: skip
    """A: place of a token of the target on the text axis -> its place in the source. Exchanged words stand for each
    other in their order, as far as both have as many tokens; words that are only the target's have no place."""
    found: dict[int, int] = {}
    for what, a, b, c, d in SequenceMatcher(a=list(source), b=list(target), autojunk=False).get_opcodes():
        if what in ("equal", "replace"):
            for i, j in zip(range(a, b), range(c, d), strict=False):
                if len(source_columns[i]) == len(target_columns[j]):
                    found |= dict(zip(target_columns[j], source_columns[i], strict=True))
    return found


@dataclass
class _Write:
    """The cross-attention of targets (odd rows) from that of their sources (even rows)."""

    places: Sequence[Mapping[int, int]]
    scales: Sequence[Mapping[int, float]]
    until: float

    def __call__(self, attention: Attention) -> Tensor | None:
        import torch

        if attention.step >= self.until and not any(self.scales):
            return None
        a = attention
        logits = a.query[a.rows][:, :, a.picture] @ a.key[a.rows].transpose(-1, -2) * a.scale
        mask = a.mask_rows()
        p = (logits if mask is None else logits + mask).softmax(-1)
        value = a.value[a.rows]
        out = a.attend()
        tokens = p.shape[-1]
        for i, (place, scale) in enumerate(zip(self.places, self.scales, strict=True)):
            own = p[2 * i + 1].clone()
            if a.step < self.until:
                # Where both have no word (start, end and padding) the source's places are the target's.
                known = {t: t for t in range(tokens) if not any(t in c for c in a.columns[2 * i + 1])} | dict(place)
                to = torch.tensor(sorted(known), device=p.device)
                own[..., to] = p[2 * i][..., torch.tensor([known[int(t)] for t in to], device=p.device)]
            for token, factor in scale.items():
                own[..., token] *= factor
            out[2 * i + 1] = own @ value[2 * i + 1]
        return out


@contextmanager
def _own_layout(model: Any, images: int, until: float) -> Iterator[None]:
    """Queries and keys of every self-attention are those of the source, for the first steps: with them its maps."""
    step = -1

    def count(*_: Any) -> None:
        nonlocal step
        step += 1

    def write(_: Any, __: Any, out: Tensor) -> Tensor | None:
        if step >= until:
            return None
        out = out.clone()
        first = len(out) - images  # rows without the prompt come first
        out[first + 1 :: 2] = out[first::2]
        return out

    handles = [model.denoiser.register_forward_pre_hook(count)]
    try:
        for name, module in model.denoiser.named_modules():
            if name.endswith((".attn1.to_q", ".attn1.to_k")):
                handles.append(module.register_forward_hook(write))
        yield
    finally:
        for handle in handles:
            handle.remove()
