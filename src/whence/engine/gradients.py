"""The gradient bank: the gradient of each example's loss, layer by layer, by watching one forward and one backward.

A layer's weight gradient is a sum over positions (tokens, pixels, nodes) of outer products, g a', of what came back
to its output (g) and what went into it (a). Both are caught by hooks, projected before they are multiplied, and
multiplied example by example in one batched product; the weights' own gradients are never made. A bias is the last
column. Exact: equal to autograd on one example at a time up to rounding (tested).

A model of which each rank holds a part (``fully_shard``) is watched as any other, if all ranks ask as often, each about
examples of its own.

Covered: Linear, transformers' Conv1D, Conv1d to Conv3d (groups too), Embedding, scales and shifts of LayerNorm,
GroupNorm, RMSNorm and of BatchNorm in evaluation, and linear layers on the nodes of a batch of graphs.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import MethodError
from ..objective import Losses, Objective
from . import ranks
from .project import Eigenbasis, EigenProjection, Projection

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Layer:
    """One tracked module; its gradient is a matrix [out, in], a bias being the last column."""

    name: str
    kind: str
    out: int
    inp: int
    bias: bool
    parameters: int


@dataclass
class Caught:
    """What one call of a module took (``a``) and gave (``y``); ``version`` of y when it was given."""

    a: Tensor
    y: Tensor
    version: int


def kind_of(module: nn.Module) -> str | None:
    """How a module's gradient is put together; None where it cannot be."""
    name = type(module).__name__.removeprefix("FSDP")  # what fully_shard puts before the name
    if isinstance(module, nn.Linear):
        # nn.MultiheadAttention uses the weight of this one without ever calling it.
        return "linear" if name != "NonDynamicallyQuantizableLinear" else None
    if isinstance(module, CONVOLUTIONS):
        return "convolution" if module.padding_mode == "zeros" else None
    if isinstance(module, nn.Embedding):
        return "embedding" if module.max_norm is None and not module.scale_grad_by_freq else None
    if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm1d | nn.BatchNorm2d):
        return "scale" if module.weight is not None and module.bias is not None else None
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    if name.endswith("RMSNorm") and weight.ndim == 1:
        return "scale"
    if name == "Conv1D" and weight.ndim == 2:  # transformers' name for a linear layer with its weight lying down
        return "transposed"
    if name == "Linear" and weight.ndim == 2 and hasattr(module, "in_channels"):  # torch_geometric's
        return "linear"
    return None


def _layer(name: str, module: nn.Module, kind: str) -> Layer:
    weight: Any = module.weight
    bias = getattr(module, "bias", None) is not None
    if kind == "scale":
        out, inp = weight.numel(), 1
    elif kind == "transposed":
        out, inp = weight.shape[1], weight.shape[0]
    else:
        out, inp = weight.shape[0], weight[0].numel()
    own = sum(p.numel() for p in module.parameters(recurse=False))
    return Layer(name, kind, out, inp + bias, bias, own)


class GradientBank:
    """Gradients of an objective's examples.

    ``layers``: name patterns ("*lora_*", "unet.mid_block*") of the modules to track; None: all that can be tracked
    and that hold trainable weights. ``projection``: None keeps the gradients whole.

    Raises MethodError where no layer is left, or a layer's activations cannot be told apart by example.
    """

    def __init__(
        self,
        objective: Objective,
        layers: Sequence[str] | None = None,
        projection: Projection | EigenProjection | Eigenbasis | None = None,
    ) -> None:
        self.objective, self.projection = objective, projection
        self.modules: dict[str, nn.Module] = {}
        self.uses: dict[str, Layer] = {}
        self.sharded = ranks.sharded(objective.module)
        found: list[Layer] = []
        missed: dict[str, int] = {}
        seen: set[int] = set()
        owner: dict[int, Layer] = {}
        # A model that is held still as a whole was frozen by its loader; one frozen in part was trained in part.
        still = not any(p.requires_grad for p in objective.module.parameters())
        for name, module in objective.module.named_modules():
            every = [p for p in module.parameters(recurse=False) if p.requires_grad or still]
            own = [p for p in every if id(p) not in seen]
            if not every:
                continue
            kind = kind_of(module)
            if not own:
                # A tied weight (an output layer that is the embedding): its gradient is the sum over all its uses.
                first = owner.get(id(every[0]))
                if first and kind and len(every) == 1 and not first.bias:
                    self.modules[name], self.uses[name] = module, first
                continue
            if layers is not None and not any(fnmatch.fnmatchcase(name, p) for p in layers):
                continue
            seen.update(map(id, own))
            if kind is None or len(own) < len(every):
                missed[f"{name} ({type(module).__name__})"] = sum(p.numel() for p in own)
                continue
            layer = _layer(name, module, kind)
            self.modules[name], self.uses[name] = module, layer
            owner[id(module.weight)] = layer
            found.append(layer)
        if not found:
            asked = "all layers" if layers is None else f"layers like {', '.join(layers)}"
            known = ", ".join(n for n, m in objective.module.named_modules() if kind_of(m))
            raise MethodError(
                f"gradients of {asked} of {objective.name}", "no layer of these can be tracked", known or "no layer"
            )
        self.layers = tuple(found)
        self.uncovered = tuple(missed)
        self.coverage = sum(x.parameters for x in found) / (sum(x.parameters for x in found) + sum(missed.values()))
        self.stage_scale: Tensor | None = None
        self._checked = False
        self._widen: set[str] = set()
        self._copied: set[str] = set()
        self._rows_each = 1
        self._sides: dict[str, tuple[Tensor | None, Tensor | None]] = {}

    @property
    def factored(self) -> tuple[str, ...]:
        """Layers whose gradient is a sum of outer products that K-FAC can factor: neither scales, embeddings,
        convolutions in groups nor tied weights."""
        tied = {layer.name for name, layer in self.uses.items() if name != layer.name}
        kinds = ("linear", "transposed", "convolution")
        return tuple(
            x.name
            for x in self.layers
            if x.kind in kinds and getattr(self.modules[x.name], "groups", 1) == 1 and x.name not in tied
        )

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Layer -> (out, in) of the gradients that are given, after projection."""
        if not self.projection:
            return {x.name: (x.out, x.inp) for x in self.layers}
        return {x.name: self.projection.target(x.name, x.out, x.inp) for x in self.layers}

    def gradients(self, examples: Sequence[Any], losses: Callable[..., Losses] | None = None) -> dict[str, Tensor]:
        """The gradient of each example's loss: layer -> [example, out, in]. ``losses``: other ones than the
        objective's own, of the same examples."""
        if not self._checked:
            self.check(examples[0])
        return self._gradients(examples, losses or self.objective.losses)

    def check(self, example: Any, drop: bool = False) -> None:
        """Hold one example's gradients against autograd's own: a layer whose weight is also used behind its back, or
        that a subclass computes in another way, would be wrong without a sign of it. Raises MethodError that names it;
        ``drop``: such layers are no longer tracked but counted among ``uncovered``.
        """
        scale, self.stage_scale = self.stage_scale, None
        given = self._gradients([example], self.objective.losses)
        self.stage_scale = scale
        grads = self._by_parts(example) if self.sharded else self._by_autograd(example)
        if grads is None:
            return  # nothing can be told by this example; the next one is held against autograd
        wrong: list[tuple[Layer, float, float]] = []
        for layer in self.layers:
            with torch.no_grad():
                weight, *bias = (ranks.whole(g) for g in grads[layer.name])
                weight = weight.T if layer.kind == "transposed" else weight.reshape(len(weight), -1)
                true = torch.cat([weight, *(b[:, None] for b in bias)], 1)
                p_out, p_in = self._side(layer, true)
                true = true if p_out is None else p_out.T @ true
                true = true if p_in is None else true @ p_in
                own = given[layer.name][0]
                off, size = float(((ranks.mean(own) if self.sharded else own) - true).norm()), float(true.norm())
            # Half-precision models and long sums round; a wrong rule is off by its own size.
            if off > 0.02 * size + 1e-6:
                wrong.append((layer, off, size))
        if wrong and (not drop or len(wrong) == len(self.layers)):
            layer, off, size = wrong[0]
            raise MethodError(
                f"gradients of {', '.join(x.name for x, *_ in wrong)} by example",
                f"they differ from autograd's: {layer.name} by {off:.3g} of {size:.3g}",
                "layers=[...] that leave them out",
            )
        for layer, *_ in wrong:
            self._drop(layer)
        self._checked = True

    def _by_autograd(self, example: Any) -> dict[str, list[Tensor]] | None:
        """layer -> autograd's gradient of its weight, and of its bias; None where the loss is not finite."""
        owned: dict[str, list[Tensor]] = {}
        for layer in self.layers:
            module: Any = self.modules[layer.name]
            owned[layer.name] = [module.weight] + ([module.bias] if layer.bias else [])
        every = [p for ps in owned.values() for p in ps]
        flags = [(p, p.requires_grad) for p in self.objective.module.parameters()]
        try:
            for p, _ in flags:
                p.requires_grad_(True)
            with torch.enable_grad():
                loss = self.objective.losses([example]).values.sum()
            if not bool(torch.isfinite(loss)):
                return None
            grads = iter(torch.autograd.grad(loss, every, allow_unused=True))
        finally:
            for p, was in flags:
                p.requires_grad_(was)
        return {
            name: [torch.zeros_like(p) if g is None else g for p, g in zip(ps, grads, strict=False)]
            for name, ps in owned.items()
        }

    def _by_parts(self, example: Any) -> dict[str, list[Tensor]] | None:
        """The same of weights that ranks hold parts of: these have gradients of a whole backward alone, and of the mean
        over ranks, each with an example of its own."""
        model = self.objective.module
        ranks.reshard(model)
        before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
        try:
            for p, _, _ in before:
                p.grad = None
                p.requires_grad_(True)
            with torch.enable_grad():
                loss = self.objective.losses([example]).values.sum()
            loss.backward()  # type: ignore[no-untyped-call]
            ranks.reshard(model)
            if ranks.on_any(not bool(torch.isfinite(loss))):
                return None
            found: dict[str, list[Tensor]] = {}
            for layer in self.layers:
                module: Any = self.modules[layer.name]
                owned = [module.weight] + ([module.bias] if layer.bias else [])
                found[layer.name] = [torch.zeros_like(p) if p.grad is None else p.grad for p in owned]
            return found
        finally:
            for p, was, grad in before:
                p.requires_grad_(was)
                p.grad = grad

    def _drop(self, layer: Layer) -> None:
        """Track a layer no longer."""
        total = sum(x.parameters for x in self.layers) / self.coverage
        self.layers = tuple(x for x in self.layers if x is not layer)
        for name in [n for n, x in self.uses.items() if x is layer]:
            del self.modules[name], self.uses[name]
        self.uncovered += (f"{layer.name} (its weight is used by others)",)
        self.coverage = sum(x.parameters for x in self.layers) / total

    def _gradients(self, examples: Sequence[Any], losses: Callable[..., Losses]) -> dict[str, Tensor]:
        caught, back, found = self._run(examples, losses)
        n = len(examples)
        out: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, calls in caught.items():
                layer = self.uses[name]
                for c, g in zip(calls, back[name], strict=True):
                    part = self._by_example(self._matrix(layer, name, c.a, g, found), found, n)
                    out[layer.name] = out[layer.name] + part if layer.name in out else part
            # A module that these examples never reach (an expert, a skipped branch) has a gradient of nothing.
            return {
                name: out[name] if name in out else found.values.new_zeros(n, *shape)
                for name, shape in self.shapes.items()
            }

    def learn_stages(self, examples: Sequence[Any], batch: int = 8) -> None:
        """Measure the mean size of the gradient at each timestep of a diffusion model's grid; from then on each row is
        divided by its timestep's (Xie et al. 2024, Diffusion-ReTrac: else the timesteps of large gradients decide)."""
        self.stage_scale = None
        total, count = torch.zeros(0), torch.zeros(0)
        for start in range(0, len(examples), batch):
            part = examples[start : start + batch]
            caught, back, found = self._run(part, self.objective.losses)
            if found.stage is None:
                return
            with torch.no_grad():
                square = torch.zeros(len(found.values), device=found.values.device)
                for name, calls in caught.items():
                    for c, g in zip(calls, back[name], strict=True):
                        square += self._matrix(self.uses[name], name, c.a, g, found).flatten(1).pow(2).sum(1)
                stages = int(found.stage.max()) + 1
                if not len(total):
                    total, count = torch.zeros(stages), torch.zeros(stages)
                owner = found.owner if found.owner is not None else torch.arange(len(square))
                # Rows of one example and one timestep (several noises) count as one gradient's parts.
                joint = owner.cpu() * stages + found.stage.cpu()
                sums = torch.zeros(len(part) * stages).index_add_(0, joint, square.cpu()).view(-1, stages)
                good = torch.isfinite(sums).all(1)
                total += sums[good].sqrt().sum(0)
                count += int(good.sum())
        if bool((count > 0).all()):
            self.stage_scale = (total / count).clamp_min(1e-20)

    def factors(
        self, examples: Sequence[Any], losses: Callable[..., Losses] | None = None, most: int | None = None
    ) -> Iterator[tuple[Layer, Tensor, Tensor]]:
        """(layer, a [row, position, in], g [row, position, out]) for layers whose gradient is a sum of outer products,
        as K-FAC wants them; not for scales and embeddings, whose gradients are no such sums worth factoring. ``most``:
        about so many positions of a layer's, of evenly spaced rows, where moments alone are wanted."""
        caught, back, found = self._run(examples, losses or self.objective.losses)
        with torch.no_grad():
            for layer in self.layers:
                if layer.name not in self.factored or layer.name not in caught:
                    continue
                pairs = [
                    (self._inputs(layer, layer.name, a, found), self._outputs(layer, g, found))
                    for a, g in (
                        self._thinned(c.a, g, found, most)
                        for c, g in zip(caught[layer.name], back[layer.name], strict=True)
                    )
                ]
                yield layer, torch.cat([a for a, _ in pairs], 1), torch.cat([g for _, g in pairs], 1)

    def tables(self, examples: Sequence[Any]) -> Iterator[tuple[Layer, Tensor, Tensor]]:
        """(layer, mass [row of the table], s [in, in]) of embedding tables, summed over these examples' positions: the
        squares of what comes back to each row, and the second moments along a row. A tied table's other use, as an
        output layer, counts too."""
        caught, back, found = self._run(examples, self.objective.losses)
        with torch.no_grad():
            for name, calls in caught.items():
                layer = self.uses[name]
                if layer.kind != "embedding":
                    continue
                for c, g in zip(calls, back[name], strict=True):
                    grads = self._outputs(layer, g, found).flatten(0, 1)
                    if kind_of(self.modules[name]) == "embedding":
                        mass = grads.new_zeros(layer.out)
                        yield layer, mass.index_add_(0, c.a.flatten(), grads.pow(2).sum(1)), grads.T @ grads
                    else:
                        into = self._inputs(layer, name, c.a, found).flatten(0, 1)
                        mass = grads.pow(2).T @ into.pow(2).sum(1)
                        yield layer, mass, into.T @ (into * grads.pow(2).sum(1)[:, None])

    @staticmethod
    def _thinned(a: Tensor, g: Tensor, found: Losses, most: int | None) -> tuple[Tensor, Tensor]:
        """Evenly spaced rows, so many that they have about ``most`` positions."""
        rows = len(found.values)
        if most is None or len(g) != rows or len(a) != rows:
            return a, g
        places = max(g[0].numel() // max(g.shape[1 if g.ndim > 3 else -1], 1), 1)
        keep = torch.linspace(0, rows - 1, max(min(rows, most // places), 1), device=g.device).long()
        return a[keep], g[keep]

    # -- one forward and one backward ---------------------------------------------------------------------------------

    def _run(
        self, examples: Sequence[Any], losses: Callable[..., Losses]
    ) -> tuple[dict[str, list[Caught]], dict[str, list[Tensor]], Losses]:
        for _ in range(4):
            caught: dict[str, list[Caught]] = {}
            with self._watch(caught, len(examples)), torch.enable_grad():
                found = losses(examples)
            rows = len(found.values)
            self._rows_each = max(rows // max(len(examples), 1), 1)
            again = self._ill(caught, rows, found)
            if not (ranks.on_any(again) if self.sharded else again):
                break
        flat = [(name, c) for name, cs in caught.items() for c in cs]
        grads = torch.autograd.grad(found.values.sum(), [c.y for _, c in flat], allow_unused=True)
        back: dict[str, list[Tensor]] = {}
        for (name, c), g in zip(flat, grads, strict=True):
            back.setdefault(name, []).append(torch.zeros_like(c.y) if g is None else g)
        return caught, back, found

    def _ill(self, caught: dict[str, list[Caught]], rows: int, found: Losses) -> bool:
        """Whether the batch has to be asked again: a value shared by all rows (a position's embedding, made once) must
        be made for each, and an output that was overwritten in place must be copied."""
        again = False
        nodes = len(found.nodes) if found.nodes is not None else -1
        for name, calls in caught.items():
            for c in calls:
                lead = c.y.shape[0]
                if c.y._version != c.version and name not in self._copied:
                    self._copied.add(name)
                    again = True
                if lead == 1 and rows > 1 and name not in self._widen:
                    self._widen.add(name)
                    again = True
                elif lead not in (rows, nodes) and name not in self._widen:
                    raise MethodError(
                        f"gradients of {name} by example",
                        f"its output's first axis is {lead} long, for {rows} rows of loss",
                        "layers=[...] that leave it out, or an objective that gives one row for each",
                    )
        return again

    @contextmanager
    def _watch(self, caught: dict[str, list[Caught]], n: int) -> Iterator[None]:
        rows = n * self._rows_each

        def before(name: str) -> Callable[..., Any]:
            def widen(module: nn.Module, args: tuple[Any, ...]) -> Any:
                x = args[0]
                if name in self._widen and x.shape[0] == 1 and rows > 1:
                    return (x.expand(rows, *x.shape[1:]), *args[1:])
                return None

            return widen

        def after(name: str) -> Callable[..., Any]:
            def catch(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
                if not y.requires_grad:
                    y = y.detach().requires_grad_()
                caught.setdefault(name, []).append(Caught(args[0].detach(), y, y._version))
                return y.clone() if name in self._copied else y

            return catch

        # fully_shard makes the weights that a pass sees of the parts; these stay as they are.
        frozen = [] if self.sharded else [(p, p.requires_grad) for p in self.objective.module.parameters()]
        with ExitStack() as stack:
            for name, module in self.modules.items():
                stack.callback(module.register_forward_pre_hook(before(name)).remove)
                stack.callback(module.register_forward_hook(after(name)).remove)
            # The weights' own gradients are not wanted: a third of the work.
            for p, _ in frozen:
                p.requires_grad_(False)
            try:
                yield
            finally:
                for p, was in frozen:
                    p.requires_grad_(was)

    # -- from what was caught to a matrix per row ---------------------------------------------------------------------

    def _side(self, layer: Layer, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(P_out [out, d_out], P_in [in, d_in]); None: that side is whole."""
        if self.projection is None:
            return None, None
        if layer.name not in self._sides:
            out, inp = self.shapes[layer.name]
            self._sides[layer.name] = (
                self.projection.side(layer.name, "out", layer.out, out),
                self.projection.side(layer.name, "in", layer.inp, inp),
            )
        p_out, p_in = (p if p is None else p.to(like) for p in self._sides[layer.name])
        self._sides[layer.name] = (p_out, p_in)
        return p_out, p_in

    def _rows(self, x: Tensor, found: Losses) -> Tensor:
        """[row, position, ...] of an activation: nodes of a batch of graphs are put beside each other, padded with
        nothing; whatever lies between the first and the last axis is positions."""
        rows = len(found.values)
        if found.nodes is not None and x.shape[0] == len(found.nodes) and len(found.nodes) != rows:
            order = torch.argsort(found.nodes, stable=True)
            count = torch.bincount(found.nodes, minlength=rows)
            place = torch.arange(len(order), device=x.device) - (count.cumsum(0) - count)[found.nodes[order]]
            dense = x.new_zeros(rows, int(count.max()), *x.shape[1:])
            dense[found.nodes[order], place] = x[order]
            return dense
        return x[:, None] if x.ndim == 1 else x

    def _inputs(self, layer: Layer, name: str, a: Tensor, found: Losses) -> Tensor:
        """What went in, [row, position, in], a one being added for the bias."""
        module: Any = self.modules[name]
        if isinstance(module, CONVOLUTIONS):
            a = _windows(a, module)
        else:
            a = a.flatten(1, -2) if a.ndim > 2 else a
            nodes = found.nodes is not None and a.shape[0] == len(found.nodes) and a.shape[0] != len(found.values)
            a = self._rows(a, found) if nodes else (a if a.ndim == 3 else a[:, None])
        return torch.cat([a, torch.ones_like(a[..., :1])], -1) if layer.bias else a

    def _outputs(self, layer: Layer, g: Tensor, found: Losses) -> Tensor:
        """What came back, [row, position, out]."""
        if layer.kind == "convolution":
            return g.flatten(2).transpose(1, 2)
        if g.ndim > 3:
            g = g.flatten(1, -2)
        nodes = found.nodes is not None and g.shape[0] == len(found.nodes) and g.shape[0] != len(found.values)
        if nodes:
            return self._rows(g, found)
        return g if g.ndim == 3 else g[:, None]

    def _matrix(self, layer: Layer, name: str, a: Tensor, g: Tensor, found: Losses) -> Tensor:
        """The gradient of each row, [row, out, in], projected."""
        p_out, p_in = self._side(layer, g)
        module: Any = self.modules[name]
        kind = kind_of(module)
        if kind == "scale":
            full = self._scale(layer, module, a, g, found)
        elif kind == "embedding":
            g = self._outputs(layer, g, found) * getattr(module, "embed_scale", 1.0)  # Gemma's, M2M100's
            ids = a.reshape(len(g), -1)
            if module.padding_idx is not None:
                g = g * (ids != module.padding_idx)[..., None]
            g = g if p_in is None else g @ p_in
            if p_out is not None:
                return p_out[ids].transpose(1, 2) @ g
            full = g.new_zeros(len(g), layer.out, g.shape[-1])
            return full.scatter_add_(1, ids[..., None].expand_as(g), g)
        elif getattr(module, "groups", 1) != 1:
            full = _grouped(
                self._inputs(layer, name, a, found), self._outputs(layer, g, found), module.groups, layer.bias
            )
        else:
            g = self._outputs(layer, g, found)
            g = g if p_out is None else g @ p_out
            if p_in is not None and kind == "convolution":
                # Projecting what each place looked at is itself a convolution: nothing is unfolded.
                return g.transpose(1, 2) @ _projected_windows(a, module, p_in, layer.bias)
            a = self._inputs(layer, name, a, found)
            a = a if p_in is None else a @ p_in
            return g.transpose(1, 2) @ a
        full = full if p_out is None else p_out.T @ full
        return full if p_in is None else full @ p_in

    def _scale(self, layer: Layer, module: Any, x: Tensor, g: Tensor, found: Losses) -> Tensor:
        """[row, channel, 1 or 2]: gradient of a norm's scale and shift."""
        if isinstance(module, nn.LayerNorm):
            hat = functional.layer_norm(x, module.normalized_shape, None, None, module.eps)
        elif isinstance(module, nn.GroupNorm):
            hat = functional.group_norm(x, module.num_groups, None, None, module.eps)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            hat = functional.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)
        else:
            eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
            eps = torch.finfo(x.dtype).eps if eps is None else eps
            hat = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
        if isinstance(module, nn.GroupNorm | nn.BatchNorm1d | nn.BatchNorm2d):
            if g.ndim > 2:
                hat, g = (t.flatten(2).transpose(1, 2) for t in (hat, g))
        elif g.ndim > 3:
            # A norm over the last axes alone: everything between the row and them is positions.
            hat, g = (t.reshape(t.shape[0], -1, layer.out) for t in (hat, g))
        nodes = found.nodes is not None and g.shape[0] == len(found.nodes) and g.shape[0] != len(found.values)
        if nodes:
            hat, g = self._rows(hat, found), self._rows(g, found)
        elif g.ndim == 2:
            hat, g = hat[:, None], g[:, None]
        columns = [(hat * g).sum(1)] + ([g.sum(1)] if layer.bias else [])
        return torch.stack(columns, -1)

    def _by_example(self, rows: Tensor, found: Losses, n: int) -> Tensor:
        if self.stage_scale is not None and found.stage is not None:
            rows = rows / self.stage_scale.to(rows)[found.stage][:, None, None]
        if found.owner is None:
            return rows
        out = rows.new_zeros(n, *rows.shape[1:])
        return out.index_add_(0, found.owner, rows)


def _windows(x: Tensor, module: Any) -> Tensor:
    """What each place of a convolution's output looked at: [row, place, channel * kernel], without its bias."""
    if isinstance(module.padding, str):
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        sides = [(t // 2, t - t // 2) if module.padding == "same" else (0, 0) for t in total]
    else:
        sides = [(p, p) for p in module.padding]
    x = functional.pad(x, [p for side in reversed(sides) for p in side])
    for axis, (k, s, d) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
        x = x.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]
    dims = len(module.kernel_size)
    # [row, channel, *place, *kernel] -> [row, *place, channel, *kernel]
    x = x.permute(0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
    return x.flatten(1 + dims).flatten(1, dims)


def _projected_windows(x: Tensor, module: Any, p_in: Tensor, bias: bool) -> Tensor:
    """:func:`_windows` (and a one for the bias) times p_in: [row, place, number]."""
    conv = (functional.conv1d, functional.conv2d, functional.conv3d)[len(module.kernel_size) - 1]
    own = p_in[:-1] if bias else p_in
    kernel = own.T.reshape(-1, x.shape[1], *module.kernel_size)
    seen = conv(x, kernel, p_in[-1] if bias else None, module.stride, module.padding, module.dilation)
    return seen.flatten(2).transpose(1, 2)


def _grouped(a: Tensor, g: Tensor, groups: int, bias: bool) -> Tensor:
    """Gradient of a convolution in groups, [row, out, in of one group]: each group sees its own channels."""
    ones = a[..., -1:] if bias else None
    a = a[..., :-1] if bias else a
    rows, places = a.shape[:2]
    own = torch.einsum("rpgi,rpgo->rgoi", a.view(rows, places, groups, -1), g.view(rows, places, groups, -1))
    full = own.reshape(rows, -1, own.shape[-1])
    return full if ones is None else torch.cat([full, g.sum(1)[..., None]], -1)
