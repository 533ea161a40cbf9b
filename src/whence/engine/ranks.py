"""How do processes that hold parts of one model go on together? Each does the same number of passes, or says why not.

A launcher (torchrun) starts the processes, ``torch.distributed`` joins them, ``fully_shard`` (FSDP2) gives each a part
of every weight: then a forward pass on one rank is one on all. What ranks decide from their own data they have to
decide as one, which is what is here. Alone, everything is answered at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MethodError, RunError

TOLD = 400
"""Bytes of a reason that travel."""
AGAIN = "what the rank that failed says, mended; then --resume (resume=True)"


def count() -> int:
    """Processes that work together; 1 where there is no launcher."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def number() -> int:
    """Which of them this is."""
    return torch.distributed.get_rank() if count() > 1 else 0


def sharded(module: nn.Module) -> bool:
    """Whether ranks hold parts of this module's weights. Raises MethodError where they are parted otherwise than by
    ``fully_shard``."""
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in module.modules()):
        found = "it is wrapped in FullyShardedDataParallel, which makes one row of all weights"
        raise MethodError("gradients by example of a sharded model", found, "torch.distributed.fsdp.fully_shard")
    if any(_parted(m) for m in module.modules()):
        return True
    if any(hasattr(p, "full_tensor") for p in module.parameters()):
        found = "its weights are parted among ranks, not by fully_shard"
        raise MethodError("gradients by example of a sharded model", found, "torch.distributed.fsdp.fully_shard")
    return False


def reshard(module: nn.Module) -> None:
    """Have the parts in place, not whole weights that a forward pass left there."""
    for m in module.modules():
        if _parted(m):
            m.reshard()  # type: ignore[operator]


def _parted(module: nn.Module) -> bool:
    return hasattr(module, "reshard") and hasattr(module, "set_requires_gradient_sync")


def whole(x: Tensor) -> Tensor:
    """All of a tensor of which this rank may hold a part. All ranks have to ask."""
    found: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return found


def mean(x: Tensor) -> Tensor:
    """Over ranks."""
    if count() == 1:
        return x
    total = x.contiguous().clone()
    _together(lambda: torch.distributed.all_reduce(total))
    return total / count()


def on_any(flag: bool) -> bool:
    """Whether it is so on any rank."""
    if count() == 1:
        return flag
    found = torch.tensor([int(flag)], device=_device())
    _together(lambda: torch.distributed.all_reduce(found))
    return bool(found)


def agree(asked: str, reason: str = "", works: str = AGAIN) -> None:
    """Go on when all ranks are here and none has a reason not to. Raises RunError with the reason of the first that
    has one, on all of them."""
    if count() == 1 and not reason:
        return
    if count() == 1:
        raise RunError(asked, reason, works)
    if not on_any(bool(reason)):
        return
    own = torch.zeros(TOLD, dtype=torch.uint8)
    text = reason.encode()[:TOLD]
    own[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    every = [torch.zeros(TOLD, dtype=torch.uint8, device=_device()) for _ in range(count())]
    _together(lambda: torch.distributed.all_gather(every, own.to(_device())))
    told = [bytes(x.tolist()).rstrip(b"\0").decode(errors="replace") for x in every]
    rank, why = next((i, t) for i, t in enumerate(told) if t)
    raise RunError(asked, f"rank {rank}: {why}", works)


def _device() -> torch.device:
    """Where small numbers have to lie so that they can travel."""
    return torch.device("cuda" if torch.distributed.get_backend() == "nccl" else "cpu")


def _together(exchange: Callable[[], Any]) -> None:
    try:
        exchange()
    except RuntimeError as error:
        raise RunError("go on with the other ranks", f"one of them ended: {first_line(error)}", AGAIN) from None


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300] if text else ''}"
