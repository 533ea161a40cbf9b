"""Objectives: the loss of one example, for language models, text-to-image models, classifiers and graph nets.

An example of a language model is a text, (prompt, text) where the prompt is read and only the text has a loss, or a
:class:`Piece` of such a text. One of a diffusion model is (caption, picture), the picture as pixels [y, x, colour] of
0..255 or as latents [channel, y, x]. One of a classifier is (input, class), one of a graph net (graph, class).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..engine.randomness import torch_stream
from ..engine.ranks import whole
from ..errors import ModelError, RunError
from ..objective import Losses


def fingerprint_of(module: nn.Module) -> str:
    """Hash of a module's weights and buffers, also of one whose ranks hold parts of them: then all have to ask."""
    found = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        raw = whole(value).detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        found.update(key.encode() + raw)
    return found.hexdigest()[:16]


class ClassifierObjective:
    """Cross-entropy of (input, class) pairs for any module that maps a batch of inputs to logits."""

    def __init__(self, module: nn.Module, name: str = "a classifier") -> None:
        self.module, self.name = module.eval(), name

    def _logits(self, examples: Sequence[Any]) -> Tensor:
        where = next(self.module.parameters())
        x = torch.stack([torch.as_tensor(np.asarray(e[0])) for e in examples]).to(where.device)
        return self.module(x.to(where.dtype) if x.is_floating_point() else x)  # type: ignore[no-any-return]

    def losses(self, examples: Sequence[Any]) -> Losses:
        logits = self._logits(examples)
        target = torch.tensor([int(e[1]) for e in examples], device=logits.device)
        return Losses(functional.cross_entropy(logits, target, reduction="none"))

    def sampled(self, examples: Sequence[Any], seed: int) -> Losses:
        logits = self._logits(examples)
        g = torch_stream("sampled", seed)
        drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=g)[:, 0].to(logits.device)
        return Losses(functional.cross_entropy(logits, drawn, reduction="none"))

    def fingerprint(self) -> str:
        return fingerprint_of(self.module)


class MarginObjective(ClassifierObjective):
    """TRAK's model output in place of the loss: minus the log-odds of the right class, -ln p/(1 - p)."""

    def losses(self, examples: Sequence[Any]) -> Losses:
        logits = self._logits(examples)
        target = torch.tensor([int(e[1]) for e in examples], device=logits.device)[:, None]
        right = logits.gather(1, target)[:, 0]
        others = logits.scatter(1, target, float("-inf")).logsumexp(1)
        return Losses(others - right)


@dataclass(frozen=True)
class Piece:
    """Characters [start, stop) of a text after its prompt: everything is read, only the tokens of these have a loss."""

    prompt: str
    text: str
    start: int
    stop: int


class LanguageObjective:
    """Token-summed cross-entropy of texts, in nats. ``length``: tokens of a text that are read; the rest is refused
    unless ``cut`` says that it may be left out."""

    def __init__(self, model: Any, length: int = 512, cut: bool = False) -> None:
        if model.encodes:
            raise ModelError(f"the loss of texts under {model.name}", "it is an encoder-decoder", "a causal model")
        self.adapter, self.length, self.cut = model, min(length, model.length or length), cut
        self.name = model.name

    @property
    def module(self) -> nn.Module:
        return self.adapter.model  # type: ignore[no-any-return]

    def tokens(self, example: Any) -> tuple[list[int], range]:
        """Token numbers, and which of them are predicted and have a loss."""
        piece = example if isinstance(example, Piece) else None
        if piece:
            prompt, text = piece.prompt, piece.text
        else:
            prompt, text = ("", example) if isinstance(example, str) else example
        ids, spans = self.adapter.encode(prompt or text)
        start = 1
        if prompt:
            more, spans = self.adapter.encode_output(text)
            ids, start = ids + more, len(ids)
        counted = range(start, len(ids))
        if piece:
            first = start if prompt else 0  # of the spans
            inside = [first + i for i, (a, b) in enumerate(spans) if a < piece.stop and b > piece.start]
            counted = range(max(inside[0], start), inside[-1] + 1) if inside else range(0)
        if len(ids) > self.length:
            if not self.cut:
                raise RunError(
                    f"the loss of a text of {len(ids)} tokens", f"at most {self.length} are read",
                    "shorter texts, length=, or cut=True to leave the rest out",
                )  # fmt: skip
            ids = ids[: self.length]
            counted = range(counted.start, min(counted.stop, len(ids)))
        if not counted:
            raise RunError(f"the loss of {text[:40]!r}", "no token of it is predicted", "a text of two tokens or more")
        return ids, counted

    def _rows(self, examples: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """logits[row, place, word] that predict target[row, place], and weight[row, place] of each."""
        found = [self.tokens(e) for e in examples]
        where = next(self.module.parameters()).device
        longest = max(len(ids) for ids, _ in found)
        ids = torch.zeros(len(found), longest, dtype=torch.long)
        mask, weight = torch.zeros(len(found), longest), torch.zeros(len(found), longest - 1)
        for row, (own, counted) in enumerate(found):
            ids[row, : len(own)] = torch.tensor(own)
            mask[row, : len(own)] = 1
            weight[row, counted.start - 1 : counted.stop - 1] = 1
        ids, mask, weight = ids.to(where), mask.to(where), weight.to(where)
        even = bool(mask.all())  # without padding the attention needs no mask, which is faster
        logits = self.module(ids, attention_mask=None if even else mask, use_cache=False).logits[:, :-1]
        return logits, ids[:, 1:], weight

    def losses(self, examples: Sequence[Any]) -> Losses:
        logits, target, weight = self._rows(examples)
        nats = functional.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none")
        return Losses((nats.view_as(weight) * weight).sum(1))

    def sampled(self, examples: Sequence[Any], seed: int) -> Losses:
        logits, _, weight = self._rows(examples)
        flat = logits.flatten(0, 1).float()
        g = torch_stream("sampled", seed)
        drawn = torch.multinomial(flat.detach().softmax(-1).cpu(), 1, generator=g)[:, 0].to(flat.device)
        nats = functional.cross_entropy(flat, drawn, reduction="none")
        return Losses((nats.view_as(weight) * weight).sum(1))

    def fingerprint(self) -> str:
        return self.adapter.fingerprint  # type: ignore[no-any-return]


OUTPUTS = ("loss", "squared norm")
"""What a diffusion model's gradient may be of: its loss, or the squared norm of what it predicts (D-TRAK)."""


class DiffusionObjective:
    """A text-to-image model's denoising loss on a fixed grid of ``timesteps`` x ``noises`` per example: a row each.

    The grid's timesteps are the middles of equal parts of the schedule; the noise of a place of the grid is the same
    for all examples, so that two examples differ by nothing but themselves. Captions are read by the model's own text
    encoder, which is held still. ``output``: one of OUTPUTS.
    """

    def __init__(self, model: Any, timesteps: int = 10, noises: int = 1, output: str = "loss", seed: int = 0) -> None:
        pipe = model.pipeline
        unet = getattr(pipe, "unet", None)
        if unet is None or getattr(unet.config, "addition_embed_type", None) or unet.config.time_cond_proj_dim:
            raise ModelError(
                f"the denoising loss of {model.name}", f"a {model.family} takes more than caption and timestep",
                "Stable Diffusion 1 or 2, or an Objective of your own",
            )  # fmt: skip
        kind = pipe.scheduler.config.get("prediction_type")
        if kind not in ("epsilon", "v_prediction", "sample"):
            raise ModelError(f"the denoising loss of {model.name}", f"it predicts {kind!r}", "epsilon, v_prediction")
        if output not in OUTPUTS:
            raise RunError(f"gradients of the output {output!r}", "no such output", ", ".join(OUTPUTS))
        self.adapter, self.output, self.kind, self.seed = model, output, kind, seed
        self.name = model.name
        self.alphas = pipe.scheduler.alphas_cumprod
        total = len(self.alphas)
        at = ((torch.arange(timesteps) + 0.5) * total / timesteps).long()
        self.grid = at.repeat_interleave(noises)
        self.place = torch.arange(timesteps).repeat_interleave(noises)
        self._read: dict[str, Tensor] = {}

    @property
    def module(self) -> nn.Module:
        return self.adapter.denoiser  # type: ignore[no-any-return]

    def latents(self, picture: Any) -> Tensor:
        """[channel, y, x] of a picture: pixels are encoded (the mode, no draw), latents are taken as they are."""
        vae = self.adapter.pipeline.vae
        x = torch.as_tensor(np.asarray(picture))
        if x.dtype != torch.uint8:
            return x.to(vae.device, torch.float32)
        with torch.no_grad():
            pixels = x.permute(2, 0, 1)[None].to(vae.device, vae.dtype) / 127.5 - 1
            encoded: Tensor = vae.encode(pixels).latent_dist.mode()[0] * vae.config.scaling_factor
            return encoded.float()

    def read(self, caption: str) -> Tensor:
        """The text encoder's states of a caption, [token, width]."""
        if caption not in self._read:
            with torch.no_grad():
                self._read[caption] = self.adapter.encode([caption], "", False).condition[0]
        return self._read[caption]

    def _predicted(self, examples: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the denoiser says and should say for each (example, place of the grid), and owner and stage."""
        module = self.module
        like = next(module.parameters())
        x0 = torch.stack([self.latents(picture) for _, picture in examples]).to(like)
        text = torch.stack([self.read(caption) for caption, _ in examples]).to(like)
        n, k = len(examples), len(self.grid)
        noise = torch.stack(
            [torch.randn(x0.shape[1:], generator=torch_stream("grid", self.seed, i)) for i in range(k)]
        ).to(like)
        alpha = self.alphas.to(like)[self.grid.to(like.device)].view(1, k, 1, 1, 1)
        a, b = alpha.sqrt(), (1 - alpha).sqrt()
        x = a * x0[:, None] + b * noise
        want = {"epsilon": noise.expand_as(x), "v_prediction": a * noise - b * x0[:, None], "sample": x0[:, None]}
        said = module(
            x.flatten(0, 1),
            self.grid.to(like.device).repeat(n),
            text.repeat_interleave(k, 0),
            return_dict=False,
        )[0]
        owner = torch.arange(n, device=like.device).repeat_interleave(k)
        return said, want[self.kind].expand_as(x).flatten(0, 1), owner, self.place.to(like.device).repeat(n)

    def losses(self, examples: Sequence[Any]) -> Losses:
        said, want, owner, stage = self._predicted(examples)
        value = (said - want) ** 2 if self.output == "loss" else said**2
        return Losses(value.flatten(1).mean(1) / len(self.grid), owner, stage)

    def sampled(self, examples: Sequence[Any], seed: int) -> Losses:
        """Targets drawn about the prediction with the spread 1, as a squared loss reads as a Gaussian's."""
        said, _, owner, stage = self._predicted(examples)
        drawn = torch.randn(said.shape, generator=torch_stream("sampled", seed)).to(said)
        return Losses(((drawn) * said).flatten(1).mean(1) * 2 / len(self.grid), owner, stage)

    def fingerprint(self) -> str:
        return f"{self.adapter.fingerprint}-{self.output.replace(' ', '-')}-{len(self.grid)}-{self.seed}"


class GraphObjective:
    """Cross-entropy of (graph, class) pairs for a PyG graph classifier, called as ``call(model, batch)``; by default
    model(x, edge_index, batch=batch). The nodes of a batch belong to its graphs."""

    def __init__(self, module: nn.Module, call: Any = None, name: str = "a graph net") -> None:
        self.module, self.name = module.eval(), name
        self.call = call or (lambda m, b: m(b.x, b.edge_index, batch=b.batch))

    def _logits(self, examples: Sequence[Any]) -> tuple[Tensor, Tensor]:
        from torch_geometric.data import Batch

        batch = Batch.from_data_list([graph for graph, _ in examples])
        return self.call(self.module, batch), batch.batch

    def losses(self, examples: Sequence[Any]) -> Losses:
        logits, nodes = self._logits(examples)
        target = torch.tensor([int(e[1]) for e in examples], device=logits.device)
        return Losses(functional.cross_entropy(logits, target, reduction="none"), nodes=nodes)

    def sampled(self, examples: Sequence[Any], seed: int) -> Losses:
        logits, nodes = self._logits(examples)
        g = torch_stream("sampled", seed)
        drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=g)[:, 0].to(logits.device)
        return Losses(functional.cross_entropy(logits, drawn, reduction="none"), nodes=nodes)

    def fingerprint(self) -> str:
        return fingerprint_of(self.module)
