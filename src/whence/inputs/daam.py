"""Which pixels did each word of my prompt draw? Ask the cross-attention.

At every step, layer and head of the denoiser each pixel spreads one unit of attention over the prompt's tokens. DAAM
adds that up per token (Tang et al. 2023, section 2.2, eq. 6 in the ACL version):

    D_k[x, y] = sum over steps j, layers l, heads h of  F~_{t_j, k, l, h}[x, y]

where F_{t,k,l,h} is head h's attention to token k, reshaped to the layer's grid, and F~ is F upscaled bicubically to
the latent's grid and clamped at 0. A word's map is the mean over its tokens. A word's region is where its map
reaches tau times its maximum: D_k[x, y] >= tau max D_k.

What it shows is where the model *looked* for the word, not what the word *caused*; `checks.swap` asks that.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..errors import MethodError, WrongMapError
from ..explanation import Cost, Explanation
from ..method import Card

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..run import Run

CARD = Card(
    name="daam",
    verb="DAAM",
    paper="Tang et al., What the DAAM: Interpreting Stable Diffusion Using Cross Attention, ACL 2023",
    systems=("S000-01",),
    question="Which pixels did each word of my prompt draw?",
    units=("word",),
    works_on=("Stable Diffusion 1 and 2", "SDXL", "PixArt"),
    needs=("cross-attention",),
    cost="one model run under the attention tape",
    claim="The map of a colour or noun is stronger on the objects that have it than on the picture's other objects.",
    falsifier={
        "trial": "shapes.pointing",
        "planted": "two objects are asked for; the seed decides their places, the oracle finds what was drawn where",
        "expect": 0.75,
        "control": "random smooth maps, and DAAM's own maps with the words' labels shuffled",
        "seconds": 60,
        "pictures": 16,
    },
    departs="Mean instead of sum over steps, layers and heads, so that values are probabilities. The middle block "
    "can be read too, blocks=('down', 'mid', 'up'): on the embedded model its coarse grid blurs the maps. Two "
    "occurrences of a word are two words. The latent grid is the run's own, not 64 x 64.",
    avoid="To tell what a word caused: a word can be looked at and do nothing, or act through the summary tokens.",
)


@dataclass(frozen=True)
class DAAM:
    """Settings. ``blocks``: which parts of the UNet are read ("mid" too, if asked); ``layers``: names of attention
    layers (None: all); ``heads``: head numbers, "all", or {layer: head numbers}, which reads these layers only;
    ``every``: record each k-th step; ``threshold``: tau of the regions, the paper's .3 to .5."""

    blocks: tuple[str, ...] = ("down", "up")
    layers: tuple[str, ...] | None = None
    heads: tuple[int, ...] | Mapping[str, tuple[int, ...]] | Literal["all"] = "all"
    every: int = 1
    threshold: float = 0.4

    def explain(self, run: Run, image: int = 0) -> Explanation:
        """Maps, scores[word, y, x], of one picture of a run: the run is made again under the tape.

        Raises MethodError where the model has no cross-attention, WrongMapError where nothing could be read or the
        run could not be replayed.
        """
        import torch

        from ..engine.attention import AttentionTape

        began = time.perf_counter()
        capabilities: frozenset[str] = getattr(run.model, "capabilities", frozenset())
        if run.model is None or "cross-attention" not in capabilities:
            raise MethodError(
                f"daam on {run.model_name} ({run.family})",
                "no cross-attention: this transformer mixes text and picture in one attention"
                if run.model is not None
                else "a run without its model",
                "concept_attention or leave_one_out" if run.model is not None else "load the model and generate",
            )
        tape = AttentionTape(keep=("layer", "head"), every=self.every)
        again = run.model.generate(run.settings, tape=tape)
        run.must_match(again)
        read = [m for m in tape.layers(image=image) if self._reads(m.name)]
        if not read:
            raise WrongMapError(
                f"layers {self.layers or self.blocks}", "none of them attends to the prompt",
                ", ".join(m.name for m in tape.layers(image=image)),
            )  # fmt: skip
        _, height, width = again.latents.shape[1:]
        total, heads = torch.zeros(len(run.words), height, width), 0
        for m in read:
            every = range(m.values.shape[1])
            wanted = self.heads[m.name] if isinstance(self.heads, Mapping) else self.heads
            chosen = [h for h in every if wanted == "all" or h in wanted]
            if not chosen:
                continue
            f = m.values[0, chosen].float()
            upscaled = torch.nn.functional.interpolate(f, (height, width), mode="bicubic", antialias=False)
            total += upscaled.clamp(min=0).sum(0)
            heads += len(f)
        if not heads:
            raise WrongMapError(f"heads {self.heads}", "no layer has them", f"0 to {read[0].values.shape[1] - 1}")
        size = run.images.shape[1:3]
        maps = torch.nn.functional.interpolate(total[None] / heads, size, mode="bicubic")[0].clamp(min=0)
        return Explanation(
            method="daam",
            units=run.words,
            scores=maps.numpy(),
            axes=("word", "y", "x"),
            readout="attention to the word",
            kind="probability",
            settings=asdict(self) | {"image": image},
            cost=Cost(run.settings.images, time.perf_counter() - began),
            details={"layers": [m.name for m in read], "heads": heads},
            run=run,
        )

    def _reads(self, layer: str) -> bool:
        if isinstance(self.heads, Mapping):
            return layer in self.heads
        part = next((b for b in ("down", "mid", "up") if f"{b}_block" in layer), "")
        return (not part or part in self.blocks) and (self.layers is None or layer in self.layers)


def region(word_map: NDArray[np.float32], threshold: float = 0.4) -> NDArray[np.bool_]:
    """Where a map, [y, x], reaches ``threshold`` of its own maximum: the paper's I(D >= tau max D)."""
    return np.asarray(word_map >= threshold * word_map.max())


def interaction(head: NDArray[np.float32], dependent: NDArray[np.float32], threshold: float = 0.15) -> dict[str, float]:
    """How the regions of a head word and its dependent overlap (section 4.1): IoU, intersection over dependent (IoD)
    and over head (IoH), each 0..1. Their means over sentences are the paper's mIoU, mIoD, mIoH.

    >>> a, b = np.zeros((4, 4)), np.zeros((4, 4))
    >>> a[:2], b[:, :2] = 1, 1
    >>> interaction(a, b)
    {'IoU': 0.3333333333333333, 'IoD': 0.5, 'IoH': 0.5}
    """
    h, d = region(head, threshold), region(dependent, threshold)
    both = float((h & d).sum())
    return {"IoU": both / float((h | d).sum()), "IoD": both / float(d.sum()), "IoH": both / float(h.sum())}
