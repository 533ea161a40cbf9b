"""Sets the weights of a small Stable Diffusion 3 so that chosen words draw at chosen places, and nothing else does.

Each word has a code, a row of a Hadamard matrix (mean 0, variance 1: layer norms leave it alone), repeated in each
head. The text encoder gives the code whatever stands around it. Place p carries, as its position embedding, the sum of
the codes of the words that are to be seen there, or a code of no word. The picture's queries and the prompt's keys
share one random rotation, so p attends to those words; the prompt's values have another rotation, except that a
*silent* word has value 0: it is looked at and gives nothing. What is drawn, and the noise, live in the directions of
no code, so that they turn no place's attention. Keys and values of the picture are 0 and modulation is off: all that a
word does, it does through the attention outputs of its places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import hadamard
from scipy.ndimage import binary_dilation
from torch import Tensor, nn

from ...engine.randomness import stream, torch_stream
from ...models.loading import load
from ...models.tiny import WORDS, tiny

HEIGHT, WIDTH, PIXELS = 8, 10, 8
"""The grid of places, and the side of a place in pixels."""
_HEADS, _CHANNELS, _SHARPNESS = 2, 16, 2.0
_ARTICLES = ("a", "and", "the")


@dataclass(frozen=True)
class Wired:
    """One wired model and a prompt for it.

    ``model``: its adapter. ``masks[word]``: the word's places, bool [y, x] on the grid. ``real`` and ``silent`` share
    their places. ``instead[word]`` can stand in the word's place: a stranger that no place looks at, or for the twins
    another silent word that theirs look at alike, so that the attention to the other twin stays what it was.
    """

    model: Any
    prompt: str
    masks: dict[str, NDArray[np.bool_]]
    objects: tuple[str, str]
    real: str
    silent: str
    instead: dict[str, str]

    def pixels(self, word: str) -> NDArray[np.bool_]:
        """A word's places as a mask of the picture, bool [y, x]."""
        return np.kron(self.masks[word], np.ones((PIXELS, PIXELS), bool))


def _regions(rng: np.random.Generator, count: int) -> list[NDArray[np.bool_]]:
    """Rectangles of 2 to 4 places a side that do not touch."""
    while True:
        # All are drawn at once and kept or dropped together: one by one, early ones can leave no room for the last.
        found = []
        for tall, wide in rng.integers(2, 5, (count, 2)):
            y, x = rng.integers(0, HEIGHT - tall + 1), rng.integers(0, WIDTH - wide + 1)
            mask = np.zeros((HEIGHT, WIDTH), bool)
            mask[y : y + tall, x : x + wide] = True
            found.append(mask)
        around = sum(binary_dilation(mask, np.ones((3, 3))).astype(int) for mask in found)
        if not any((mask & (around > 1)).any() for mask in found):
            return found


def wire(number: int) -> Wired:
    """Model and prompt number ``number``: words, their order, places, rotations and the twins' coin are drawn anew."""
    rng = stream("joint", "wiring", number)
    names = [str(w) for w in rng.permutation([w for w in WORDS if w not in _ARTICLES])[:6]]
    first, second, real, silent, hush, stranger = names
    here, there, shared = _regions(rng, 3)
    one, two, three, four = rng.permutation(names[:4])
    masks = {first: here, second: there, real: shared, silent: shared}
    rows = np.tile(rng.permutation(hadamard(_CHANNELS)[1:]), _HEADS)
    codes = dict(zip([*names, *_ARTICLES], rows, strict=False))
    nowhere = ~(here | there | shared)
    seen = sum(np.multiply.outer(m, codes[w]) for w, m in [*masks.items(), (hush, shared)])
    pipeline = tiny("sd3", number, heads=_HEADS, channels=_CHANNELS, layers=2)
    with torch.no_grad():
        _text(pipeline, codes)
        used = [*codes.values(), rows[-1]]
        free = _without([*used, np.ones(_CHANNELS, int)])
        _places(pipeline.transformer, seen + np.multiply.outer(nowhere, rows[-1]), free)
        for block in pipeline.transformer.transformer_blocks:
            _block(block, _without([codes[silent], codes[hush]]), free, torch_stream("joint", "rotations", number))
    prompt = f"a {one} {two} and the {three} {four}"
    instead = {first: stranger, second: stranger, real: hush, silent: hush}
    return Wired(load(pipeline), prompt, masks, (first, second), real, silent, instead)


def _zero(*modules: nn.Module) -> None:
    for module in modules:
        for parameter in module.parameters():
            parameter.zero_()


def _text(pipeline: Any, codes: dict[str, NDArray[np.int_]]) -> None:
    """The first CLIP gives codes, whatever the context; the second CLIP and T5 give zeros."""
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        for name, module in encoder.named_modules():
            if name.endswith(("out_proj", "fc2", "token_embedding", "position_embedding")):
                _zero(module)
            if name.endswith("token_embedding") and encoder is pipeline.text_encoder:
                for word, code in codes.items():
                    module.weight[pipeline.tokenizer(word).input_ids[1]] = torch.tensor(code, dtype=torch.float32)
    _zero(pipeline.text_encoder_3)
    embedder = pipeline.transformer.context_embedder
    _zero(embedder)
    embedder.weight.copy_(torch.eye(*embedder.weight.shape))


def _places(transformer: Any, codes: Any, free: Tensor) -> None:
    """Position embeddings from codes [y, x, channel]; the noise stays, in the free directions, at a third of them."""
    embed = transformer.pos_embed
    side = embed.pos_embed_max_size
    top, left = (side - HEIGHT) // 2, (side - WIDTH) // 2
    table = embed.pos_embed.view(side, side, -1)
    table.zero_()
    table[top : top + HEIGHT, left : left + WIDTH] = torch.tensor(codes, dtype=torch.float32)
    _zero(transformer.norm_out)
    embed.proj.bias.zero_()
    noise = torch.einsum("oc,cijk->oijk", free, embed.proj.weight)
    embed.proj.weight.copy_(noise * 0.3 / noise.square().sum((1, 2, 3)).mean().sqrt())


def _heads(matrices: list[Tensor]) -> Tensor:
    """A matrix for each head, on the diagonal of [channel, channel]."""
    return torch.block_diag(*matrices)  # type: ignore[no-any-return, no-untyped-call]


def _without(codes: list[NDArray[np.int_]]) -> Tensor:
    """Projection [channel, channel] that takes these orthogonal codes out of each head."""
    unit = torch.tensor(np.stack([c[:_CHANNELS] for c in codes]), dtype=torch.float32) / _CHANNELS**0.5
    return _heads([torch.eye(_CHANNELS) - unit.T @ unit] * _HEADS)


def _rotation(generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix for each head."""
    draws = [torch.randn(_CHANNELS, _CHANNELS, generator=generator) for _ in range(_HEADS)]
    return _heads([torch.linalg.qr(draw)[0] for draw in draws])


def _block(block: Any, deaf: Tensor, free: Tensor, generator: torch.Generator) -> None:
    attn = block.attn
    _zero(block.norm1, block.norm1_context, attn)
    # Modulation is six parts: shift, scale and gate of the attention, then of the feed-forward. Only one gate opens.
    block.norm1.linear.bias.view(6, -1)[2] = 1
    looking = _SHARPNESS * _rotation(generator)
    for projection in (attn.to_q, attn.add_q_proj, attn.add_k_proj):
        projection.weight.copy_(looking)
    attn.add_v_proj.weight.copy_(_rotation(generator) @ deaf)
    attn.to_out[0].weight.copy_(free @ _rotation(generator))
