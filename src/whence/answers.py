"""Does a text hold this answer? Names and numbers are found whatever their case, punctuation and leading article."""

from __future__ import annotations

import re
import unicodedata

_ARTICLES = ("a", "an", "the")
_NUMBER = re.compile(r"(\d+|\d{1,3}(?:,\d{3})+)(\.\d+)?")


def holds(text: str, answer: str) -> bool:
    """Does a text hold this answer, whatever its case, punctuation and leading article?

    >>> holds("1,000 points", "1000"), holds("3,124 m", "124"), holds("a Broncos-fan", "The  Broncos")
    (True, False, True)
    """
    return _pattern(answer).search(_plain(text)) is not None


def put(text: str, answer: str, value: str) -> str:
    """The text with every occurrence of the answer replaced.

    >>> put("Velm, or velm.", "Velm", "Orsk")
    'Orsk, or Orsk.'
    """
    return _pattern(answer).sub(lambda _: value, _plain(text))


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _pattern(answer: str) -> re.Pattern[str]:
    """Words of the answer with at most a little punctuation or space between. A number is not found in a longer one."""
    number = _NUMBER.fullmatch(answer.strip())
    if number:
        whole, rest = number[1].replace(",", ""), re.escape(number[2] or "")
        grouped = f"|{int(whole):,}" if len(whole) > 3 and whole[0] != "0" else ""
        return re.compile(rf"(?<!\w)(?<!\d[.,])(?:{whole}{grouped}){rest}(?!\w)(?![.,]\d)")
    words = re.findall(r"\w+", _plain(answer))
    if len(words) > 1 and words[0].lower() in _ARTICLES:
        words = words[1:]
    if not words:
        return re.compile(re.escape(answer.strip()) or r"(?!)")
    longer = r"(?![.,]\d)" if words[-1][-1].isdigit() else ""
    # "US" is not "us": an abbreviation keeps its case.
    short = len("".join(words)) < 5 and "".join(words).isupper()
    pattern = r"(?<!\w)" + r"\W{0,3}".join(map(re.escape, words)) + r"(?!\w)" + longer
    return re.compile(pattern, re.NOFLAG if short else re.I)
