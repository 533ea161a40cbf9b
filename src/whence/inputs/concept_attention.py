"""Where in the picture is this concept, even one that I never wrote? Ask the outputs of the joint attention.

A multimodal transformer (SD3, FLUX's double blocks) carries picture tokens x and prompt tokens side by side.
ConceptAttention (Helbling et al. 2025) adds a third stream of concept tokens c, one for each concept:

    start    c = the text encoder's embedding of the concept alone
    attend   o_c = softmax(q_c [k_x, k_c]^T / sqrt d) [v_x, v_c]    with the prompt's own weights for q_c, k_c, v_c
    go on    c <- c + o_c P, then the prompt's own feed-forward, with the prompt's norms and modulation
    score    phi(c, x) = softmax over concepts of  o_c . o_x        o_x: what the picture token got from its attention

Concepts read the picture and each other; nothing reads them, so the picture keeps every bit. Scores are averaged over
blocks and steps. The vectors o are all heads side by side, before the output projection P.

What it shows is where picture and concept *got the same content*, not what a word *caused*; `checks.swap` asks that.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..errors import MethodError, PromptError, RunError
from ..explanation import Cost, Explanation
from ..method import Card
from ..units import Units

if TYPE_CHECKING:
    from torch import Tensor

    from ..run import Run

CARD = Card(
    name="concept_attention",
    verb="ConceptAttention",
    paper="Helbling et al., ConceptAttention: Diffusion Transformers Learn Highly Interpretable Features, ICML 2025",
    systems=(),
    question="Where in the picture is this concept, even one that is not in my prompt?",
    units=("word", "concept"),
    works_on=("Stable Diffusion 3", "FLUX"),
    needs=("joint-attention",),
    cost="one model run with a few more tokens in each two-stream block",
    claim="A word's map is stronger where the model drew the word than where it drew another word, and stronger than "
    "the map of a twin that the same places attended to but that drew nothing.",
    falsifier={
        "trial": "joint.wired",
        "planted": "a transformer whose weights are set, not trained: the seed decides which places each word draws, "
        "and which of two twins that the same places look at has content; certified by swapping each word",
        "expect": 0.9,
        "control": "random smooth maps, a centre map, and ConceptAttention's own maps with the words' labels shuffled",
        "seconds": 20,
        "pictures": 16,
    },
    departs="Written from the abstract and the authors' code; the paper's full text was not at hand. A concept of "
    "several text tokens starts as their mean (authors, FLUX: the first T5 token). On SD3 each concept is encoded "
    "alone, in the CLIP half of the text, with the pooled prompt zeroed and raw dot products, as on FLUX (authors, "
    "SD3: the concepts as one prompt, the prompt's own pooled text, concept vectors scaled to length 1 and averaged "
    "over steps before the dot product). Softmax in each block and step, then the mean. Blocks by default as the "
    "authors': the last 4 of FLUX's 19, all of SD3's. FLUX's single blocks have no text side of their own and are "
    "left out, as there.",
    avoid="To tell what a word caused. With softmax the concepts share each place, so ask for rivals ('background'); "
    "with or without it a map depends a little on the other concepts, unless together=False and softmax=False.",
)

_LAST = {"FLUX": 4 / 19}
"""The share of the two-stream blocks, from the last, that is read by default; all of them in other families."""


@dataclass(frozen=True)
class ConceptAttention:
    """Settings. ``concepts``: words or phrases (None: the prompt's words); ``layers``: numbers of two-stream blocks
    (None: as the authors' code); ``steps``: denoiser passes (None: all); ``softmax``: values are shares of the concepts
    at each place, else dot products; ``together``: concepts attend to each other too, as in the paper."""

    concepts: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    steps: tuple[int, ...] | None = None
    softmax: bool = True
    together: bool = True

    def explain(self, run: Run, image: int = 0) -> Explanation:
        """Maps, scores[word, y, x], of one picture of a run: the run is made again with the concepts beside it.

        Concepts that all stand in the prompt are its words ("red#2" is the second red), others units of their own.
        Raises MethodError where the model has no joint attention, WrongMapError where a block or step is not there
        or the run could not be replayed, PromptError for a concept that the text encoder cannot take.
        """
        from torch.nn.functional import interpolate

        from ..engine.concept_stream import ConceptStream

        began = time.perf_counter()
        model: Any = run.model
        if model is None or "joint-attention" not in getattr(model, "capabilities", frozenset()):
            raise MethodError(
                f"concept_attention on {run.model_name} ({run.family})",
                "a run without its model" if model is None else "no joint attention of picture and text",
                "load the model and generate" if model is None else "daam or leave_one_out",
            )
        if not 0 <= image < run.settings.images:
            raise RunError(f"picture {image}", f"the run has {run.settings.images}", "a number from 0")
        units = self._units(run)
        layers = self.layers if self.layers is not None else _blocks(model, run)
        stream = ConceptStream(embed(model, units.names), layers, self.steps, self.softmax, self.together)
        again = model.generate(run.settings, tape=stream)
        run.must_match(again)
        phi = stream.similarities(image)
        maps = interpolate(phi[None], run.images.shape[1:3], mode="bicubic")[0]
        return Explanation(
            method="concept_attention",
            units=units,
            scores=(maps.clamp(0, 1) if self.softmax else maps).numpy(),
            axes=("word", "y", "x"),
            readout="likeness of the picture to the word",
            kind="output similarity",
            settings=asdict(self) | {"image": image},
            cost=Cost(run.settings.images, time.perf_counter() - began),
            notes=("values are shares of these words at each place",) if self.softmax else (),
            details={"blocks": list(layers), "grid": list(phi.shape[1:])},
            run=run,
        )

    def _units(self, run: Run) -> Units:
        if self.concepts is None:
            return run.words
        if not self.concepts or len(set(self.concepts)) < len(self.concepts):
            raise PromptError(f"the concepts {self.concepts}", "none, or one of them twice", "each concept once")
        if set(self.concepts) <= set(run.words.labels):
            return run.words.subset([run.words.find(concept) for concept in self.concepts])
        return Units("concept", self.concepts, tuple(() for _ in self.concepts))


def _blocks(model: Any, run: Run) -> tuple[int, ...]:
    from ..engine.concept_stream import two_streams

    count = sum(map(two_streams, model.layers(run.settings.height, run.settings.width)))
    return tuple(range(count - max(round(_LAST.get(run.family, 1.0) * count), 1), count))


def embed(model: Any, concepts: tuple[str, ...]) -> Tensor:
    """Embeddings [concept, feature]: each concept encoded alone as a prompt, the mean over its tokens.

    The tokens are those of the first text encoder on the model's text axis that keeps them. Raises PromptError.
    """
    import torch

    apart = list(dict.fromkeys(concepts))
    units = [model.words(concept) for concept in apart]
    with torch.no_grad():
        encoded = model.encode(apart, "", False).condition
    rows = {}
    for concept, words, row in zip(apart, units, encoded, strict=True):
        first = next(i for i in range(len(model.encoders())) if any(own[i] for own in words.members))
        start = model.encoders()[first].start
        rows[concept] = row[[start + place for own in words.members for place in own[first]]].mean(0)
    return torch.stack([rows[concept] for concept in concepts])
