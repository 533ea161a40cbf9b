"""Extra tokens that read a joint-attention transformer and are never read by it, so the picture keeps every bit.

A block with two streams (picture and text) gets a third: the extra tokens pass through the *text* side's own norm,
modulation, projections and feed-forward; their queries meet the picture's keys and their own, nobody's queries meet
theirs. With o the attention's output before its output projection, all heads side by side, each watched block gives

    similarity(token, place) = o_token . o_place

summed in place over blocks and denoiser passes. Blocks are found by the names that diffusers gives their parts
(``norm1_context``, ``add_q_proj``, ``to_add_out``, ``ff_context``: SD3, FLUX); attentions without a text side (FLUX's
single blocks) are passed over. Give the stream to ``model.generate(settings, tape=stream)`` like an attention tape.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ..errors import RunError, WrongMapError
from .capture import Attention, Layer, Plan, Watch, watching


def two_streams(layer: Layer) -> bool:
    """Whether an attention has a text side of its own, with its own projections."""
    return layer.kind == "joint" and getattr(layer.module, "added_kv_proj_dim", None) is not None


@dataclass
class _Batch:
    """One watched batch: sum of similarities [image, token, place], and how often each block gave one."""

    plan: Plan
    blocks: tuple[Layer, ...]
    total: Tensor | None = None
    hits: dict[str, int] = field(default_factory=dict)
    steps: set[int] = field(default_factory=set)


class ConceptStream:
    """Runs ``tokens`` [token, feature], embedded as the prompt's tokens are, beside one generation.

    ``layers``: numbers, among the blocks with two streams, of those that are read (None: all); blocks before the last
    of these still move the tokens on. ``steps``: denoiser passes that are read (None: all). ``softmax``: each block's
    similarities are made shares of the tokens at each place before they are averaged. ``together``: the tokens also
    attend to each other; otherwise each to the picture and itself, so that none depends on the others' presence.

    The modulation of the tokens has the pass's time (and guidance) and a pooled prompt of zeros.
    """

    def __init__(
        self,
        tokens: Tensor,
        layers: Sequence[int] | None = None,
        steps: Sequence[int] | None = None,
        softmax: bool = False,
        together: bool = True,
    ) -> None:
        self.tokens, self.softmax, self.together = tokens, softmax, together
        self.layers = None if layers is None else frozenset(layers)
        self.steps = None if steps is None else frozenset(steps)
        self._batches: list[_Batch] = []
        self._watch: Watch | None = None
        self._hidden: Tensor | None = None
        self._modulation: Tensor | None = None
        self._attention: Attention | None = None

    # Before and during the run ------------------------------------------------------------------------------------

    def rewind(self) -> None:
        """Forget what was recorded: a stream holds one generation."""
        self._batches = []

    def check(self, layers: Sequence[Layer], words: int, images: int, calls: int) -> None:
        """Raises WrongMapError before any work if there is no block to read, or one or a step that is not there."""
        blocks = [layer for layer in layers if two_streams(layer)]
        wrong = (self.layers or frozenset()) - set(range(len(blocks)))
        late = (self.steps or frozenset()) - set(range(calls))
        if not blocks or wrong or self.layers == frozenset():
            raise WrongMapError(
                f"similarities in blocks {sorted(self.layers) if self.layers is not None else 'of two streams'}",
                f"the model has {len(blocks)} blocks with a text side of their own",
                f"numbers 0 to {len(blocks) - 1}" if blocks else "SD3, or FLUX with double blocks",
            )
        if late or self.steps == frozenset():
            raise WrongMapError(
                f"similarities at steps {sorted(self.steps or ())}",
                f"the run has {calls} denoiser passes",
                f"numbers 0 to {calls - 1}",
            )

    @contextmanager
    def on(self, plan: Plan) -> Iterator[Watch]:
        """Watch one batch; all hooks come off at the end. Raises WrongMapError if a block was not seen at each step."""
        blocks = tuple(layer for layer in plan.layers if two_streams(layer))
        last = max(range(len(blocks)) if self.layers is None else self.layers)
        self._batches.append(_Batch(plan, blocks[: last + 1]))
        try:
            with ExitStack() as stack, watching(plan, self) as self._watch:
                denoiser: Any = plan.denoiser
                hook = denoiser.time_text_embed.register_forward_hook(self._begin)
                stack.callback(hook.remove)
                for number, layer in enumerate(blocks[: last + 1]):
                    block, attn = (denoiser.get_submodule(name) for name in (layer.name.rpartition(".")[0], layer.name))
                    hook = attn.to_out[0].register_forward_pre_hook(
                        lambda _, args, number=number, layer=layer, block=block: self._pass(number, layer, block, args)
                    )
                    stack.callback(hook.remove)
                yield self._watch
        finally:
            self._watch = self._hidden = self._modulation = self._attention = None
        batch = self._batches[-1]
        read = [b.name for i, b in enumerate(batch.blocks) if self.layers is None or i in self.layers]
        if not batch.steps or any(batch.hits.get(name) != len(batch.steps) for name in read):
            raise WrongMapError(
                "the similarity of picture and concepts",
                "not every block was seen at every step",
                "a model whose attention runs through torch's kernel, without cached, merged or compiled blocks",
            )

    def wants(self, layer: Layer, step: int) -> bool:
        """Whether an attention's keys and values are needed."""
        reads = self.steps is None or step in self.steps
        return reads and any(layer is block for block in self._batches[-1].blocks)

    def edit(self, attention: Attention) -> Tensor | None:
        """Nothing is ever changed."""
        return None

    def seen(self, attention: Attention, lse: Tensor | None) -> None:
        """Holds the keys and values until the same attention's output comes by."""
        self._attention = attention

    def _begin(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """A pass has made its modulation: make the tokens' own, and start them from their embeddings."""
        assert self._watch is not None
        self._hidden, rows = None, self._watch.rows
        if rows is None or not (self.steps is None or self._watch.step in self.steps):
            return
        *times, pooled = args
        self._modulation = module.forward(*times, torch.zeros_like(pooled))[rows]
        denoiser: Any = self._batches[-1].plan.denoiser
        tokens = denoiser.context_embedder(self.tokens.to(pooled.device, pooled.dtype))
        self._hidden = tokens.expand(rows.stop - rows.start, *tokens.shape)

    def _pass(self, number: int, layer: Layer, block: Any, args: tuple[Any, ...]) -> None:
        """The picture's attention outputs are about to be projected: take the tokens through the same block."""
        seen, self._attention = self._attention, None
        if seen is None or seen.layer is not layer or self._hidden is None:
            return
        attn: Any = layer.module
        hidden, modulation = self._hidden, self._modulation
        if attn.context_pre_only:
            normed, gates = block.norm1_context(hidden, modulation), None
        else:
            normed, *gates = block.norm1_context(hidden, emb=modulation)
        outputs = self._attend(attn, normed, seen)
        if self.layers is None or number in self.layers:
            self._add(layer, outputs, args[0][seen.rows])
        if gates is None:
            self._hidden = None  # the text stream ends here
            return
        gate, shift_ff, scale_ff, gate_ff = (g[:, None] for g in gates)
        hidden = hidden + gate * attn.to_add_out(outputs)
        normed = block.norm2_context(hidden) * (1 + scale_ff) + shift_ff
        hidden = hidden + gate_ff * block.ff_context(normed)
        half = torch.finfo(torch.float16).max
        self._hidden = hidden.clip(-half, half) if hidden.dtype == torch.float16 else hidden

    def _attend(self, attn: Any, normed: Tensor, seen: Attention) -> Tensor:
        """Attention outputs [image, token, channel] of the tokens, before the output projection."""

        def heads(projection: nn.Module, norm: nn.Module | None = None) -> Tensor:
            flat: Tensor = projection(normed)
            split = flat.view(*flat.shape[:2], seen.query.shape[1], -1).transpose(1, 2)
            return split if norm is None else cast(Tensor, norm(split))

        # Rotary models put their text at place 0, where the rotation is the identity: nothing to rotate here.
        query = heads(attn.add_q_proj, attn.norm_added_q)
        key, value = heads(attn.add_k_proj, attn.norm_added_k), heads(attn.add_v_proj)
        count, places = query.shape[-2], seen.layer.grid
        mask = None
        if not self.together:
            mask = torch.ones(count, count + places, dtype=torch.bool, device=query.device)
            mask[:, :count] = torch.eye(count, dtype=torch.bool, device=query.device)
        out = scaled_dot_product_attention(
            query,
            torch.cat((key, seen.key[seen.rows, :, seen.picture]), dim=2),
            torch.cat((value, seen.value[seen.rows, :, seen.picture]), dim=2),
            attn_mask=mask,
            scale=seen.scale,
        )
        return out.transpose(1, 2).flatten(2)

    def _add(self, layer: Layer, tokens: Tensor, places: Tensor) -> None:
        assert self._watch is not None
        batch = self._batches[-1]
        similarity = tokens.float() @ places.float().transpose(1, 2)
        if self.softmax:
            similarity = similarity.softmax(dim=1)
        batch.total = similarity if batch.total is None else batch.total.add_(similarity)
        batch.hits[layer.name] = batch.hits.get(layer.name, 0) + 1
        batch.steps.add(self._watch.step)

    # After the run ------------------------------------------------------------------------------------------------

    def similarities(self, image: int = 0) -> Tensor:
        """Mean similarities [token, y, x] of one picture, on the grid of its tokens."""
        asked = image
        for batch in self._batches:
            count = len(batch.plan.columns)
            if 0 <= image < count and batch.total is not None:
                grid = batch.blocks[0]
                mean = batch.total[image] / sum(batch.hits.values())
                return mean.view(-1, grid.height, grid.width).cpu()
            image -= count
        held = sum(len(batch.plan.columns) for batch in self._batches)
        raise RunError(f"the similarities of picture {asked}", f"{held} pictures were recorded", "a number from 0")
