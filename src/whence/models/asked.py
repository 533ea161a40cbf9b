"""What a language model was asked about one run, and what it said: once, and, where a file is given, once for all.

An explanation of a long prompt asks for thousands of versions. What was measured is appended to the file every few
seconds and when the work is stopped, so that the same work, started again, asks only for what is missing. The file is
one of :class:`~whence.engine.journal.Journal`: what another version of this package measured is not taken over, and
several works may share it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..engine.ablate import Ablation, Values, Version
from ..engine.journal import Journal
from .seq2seq import EncoderAblation

if TYPE_CHECKING:
    from ..text import TextRun

SECONDS = 2.0
"""So much work at most is lost by a crash."""


class Asked:
    """Values by version and by the way in which attention was scaled ("": not at all). ``engines``: by the same way and
    by the removal, what asks the model; ``narrow``: whether shortcuts of the gradients' pass were tried and hold."""

    def __init__(self, run: TextRun, path: Path | None = None) -> None:
        self._values: dict[bytes, Values] = {}
        self._new: dict[str, list[float]] = {}
        self._kept, self._part = time.monotonic(), 0
        self.engines: dict[tuple[str, str], Ablation | EncoderAblation] = {}
        self.narrow: bool | None = None
        said = ",".join(map(str, (*run.prompt_ids, "", *run.output_ids)))
        self._names = ("asked", run.fingerprint, hashlib.sha256(said.encode()).hexdigest())
        self._journal = None if path is None else Journal(path)
        if self._journal is not None:
            while (part := self._journal.get(*self._names, self._part)) is not None:
                self._values |= {bytes.fromhex(k): np.array(v) for k, v in part.items()}
                self._part += 1

    def __len__(self) -> int:
        return len(self._values)

    def get(self, how: str, version: Version) -> Values | None:
        """What was said; None if it was not asked."""
        return self._values.get(_digest(how, version))

    def put(self, how: str, version: Version, values: Values) -> None:
        """Take over what was said."""
        name = _digest(how, version)
        self._values[name] = values
        if self._journal is not None:
            self._new[name.hex()] = values.tolist()
            if time.monotonic() - self._kept > SECONDS:
                self._keep()

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """What was said inside is in the file when it ends by an error, and soon when it ends well."""
        try:
            yield
        except BaseException:
            self._keep()
            raise
        if time.monotonic() - self._kept > SECONDS:
            self._keep()

    def _keep(self) -> None:
        if self._journal is not None and self._new:
            self._journal.put(self._new, *self._names, self._part)
            self._new, self._part = {}, self._part + 1
        self._kept = time.monotonic()


def _digest(how: str, version: Version) -> bytes:
    named = f"{how} {len(version.target)} ".encode()
    return hashlib.blake2b(named + version.key, digest_size=16).digest()
