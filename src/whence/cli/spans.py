"""A stretch of the output as it is typed: ``--span``."""

from __future__ import annotations

import re


def span_of(text: str) -> str | tuple[int, int]:
    """--span as words of the output, or as characters ``start:end``."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    return (int(match[1]), int(match[2])) if match else text
