"""The page of a trace: the numbers of the record, drawn; nothing unescaped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from whence.explanation import Cost, Explanation
from whence.report.folder import check_folder
from whence.report.trace_page import TraceBundle, trace_html, write_trace
from whence.units import Units
from whence.verdict import judge


def bundle(word: str = "red") -> TraceBundle:
    names = ("down.0.attn2", "mid.attn2", "up.1.resnets.0")
    effects = [0.1, 0.9, -0.05]
    rows = [
        {"site": n, "kind": "resnet" if "resnet" in n else "cross-attention", "parameters": 10, "depth": i,
         "effect": e, "interval": (e - 0.1, e + 0.1), "effects": [e, e], "closeness": None if i == 0 else 0.5,
         "alone": i > 0}
        for i, (n, e) in enumerate(zip(names, effects, strict=True))
    ]  # fmt: skip
    found = Explanation(
        "causal_trace", Units("site", names, tuple(((i,),) for i in range(3))), np.array(effects, np.float32),
        ("site",), "share of the objects: red", "indirect effect",
        {"word": word, "corruption": {"how": "swap", "scale": 3.0, "other": "blue", "after": True}, "seeds": 2,
         "where": "denoiser"},
        Cost(8, 1.0), details={"word": word, "sites": rows, "order": [1, 0, 2], "total": [1.0, 1.0],
                               "runs_one_by_one": 10},
    )  # fmt: skip
    verdict = judge([0.9, 0.8, 0.95, 0.9, 0.85, 0.9], [0.0, 0.1, 0.0, 0.0, 0.1, 0.0], claim="c", delta=0.2, runs=12)
    picture = np.zeros((64, 64, 3), np.uint8)
    return TraceBundle(found, {"clean": picture, "corrupted": picture}, verdict, ["whence", "trace", "a b"])


def test_the_page_ranks_the_sites_and_says_the_verdict() -> None:
    page = trace_html(bundle())
    assert page.index("<code>mid.attn2") < page.index("<code>down.0.attn2") < page.index("<code>up.1.resnets.0")
    assert "supported" in page
    assert page.count("<rect") == 3
    assert "in a group" in page
    assert "<script" not in page


def test_what_is_printed_is_escaped() -> None:
    page = trace_html(bundle("<script>alert(1)</script>"))
    assert "<script>" not in page


def test_the_folder_is_whole_and_can_be_replaced(tmp_path: Path) -> None:
    page = write_trace(bundle(), tmp_path / "out")
    record = json.loads((page.parent / "trace.json").read_text(encoding="utf8"))
    assert [r["site"] for r in record["sites"]] == ["mid.attn2", "down.0.attn2", "up.1.resnets.0"]
    assert record["cost"]["runs"] == 20
    assert record["cost"]["of_them_for_the_verdict"] == 12
    assert check_folder(page.parent) == page.parent
    write_trace(bundle(), tmp_path / "out")
