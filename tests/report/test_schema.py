import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic import make_bundle

import whence.report.bundle
from whence.report.bundle import Bundle
from whence.report.folder import SCHEMA

PATH = Path(whence.report.bundle.__file__).parent / "explanation.schema.json"
TYPES: dict[str, Any] = {
    "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "null": type(None),
}  # fmt: skip
KNOWN = {
    "$schema", "$id", "$ref", "$defs", "title", "description", "type", "required", "properties", "additionalProperties",
    "items", "minItems", "maxItems", "minimum", "const", "enum",
}  # fmt: skip


def broken(value: Any, rule: dict[str, Any], root: dict[str, Any], at: str = "") -> list[str]:
    """What does not fit, for the part of JSON Schema that the file uses."""
    assert set(rule) <= KNOWN, set(rule) - KNOWN
    if "$ref" in rule:
        return broken(value, root["$defs"][rule["$ref"].rsplit("/", 1)[1]], root, at)
    types = [rule["type"]] if isinstance(rule.get("type"), str) else rule.get("type", [])
    if types and (isinstance(value, bool) or not any(isinstance(value, TYPES[t]) for t in types)):
        return [f"{at}: {value!r} is no {types}"]
    out = [f"{at}.{k} is missing" for k in rule.get("required", []) if k not in value]
    out += [f"{at}: {value!r}"] * ("const" in rule and value != rule["const"])
    out += [f"{at}: {value!r}"] * ("enum" in rule and value not in rule["enum"])
    out += [f"{at}: {value!r}"] * ("minimum" in rule and value is not None and value < rule["minimum"])
    if isinstance(value, list):
        out += [f"{at}: {len(value)}"] * (not rule.get("minItems", 0) <= len(value) <= rule.get("maxItems", 10**9))
        out += [x for i, v in enumerate(value) for x in broken(v, rule.get("items", {}), root, f"{at}[{i}]")]
    if isinstance(value, dict):
        for k, v in value.items():
            inner = rule.get("properties", {}).get(k, rule.get("additionalProperties", {}))
            out += broken(v, inner, root, f"{at}.{k}")
    return out


def test_the_record_fits_its_schema(bundle: Bundle) -> None:
    schema = json.loads(PATH.read_text())
    record = json.loads(bundle.json())
    assert record["schema"] == schema["$id"] == SCHEMA
    assert broken(record, schema, schema) == []
    assert len(record["trials"]) > 15


@pytest.mark.parametrize("spoil", ["schema", "run", "trials", "files"])
def test_a_record_that_lost_a_field_does_not_fit(bundle: Bundle, spoil: str) -> None:
    schema, record = json.loads(PATH.read_text()), json.loads(bundle.json())
    del record[spoil]
    assert broken(record, schema, schema)


def test_a_wrong_word_does_not_fit(bundle: Bundle) -> None:
    schema, record = json.loads(PATH.read_text()), json.loads(bundle.json())
    record["trials"][0]["verdict"]["word"] = "proven"
    assert len(broken(record, schema, schema)) == 1


def test_numbers_that_are_not_finite_are_null_and_numpy_is_plain() -> None:
    b = make_bundle("a red circle")
    b.explanations[0].details["odd"] = {"x": np.float32("nan"), "y": (np.int64(3), float("inf")), "z": Path("p")}
    found = json.loads(b.json())["explanations"][0]["details"]["odd"]
    assert found == {"x": None, "y": [3, None], "z": "p"}


def test_the_document_names_every_field() -> None:
    schema = json.loads(PATH.read_text())
    text = (Path(__file__).parents[2] / "docs" / "explanation-schema.md").read_text()
    verdict = schema["properties"]["trials"]["items"]["properties"]["verdict"]["properties"]
    for name in [*schema["properties"], *schema["properties"]["run"]["properties"], *verdict]:
        assert f"`{name}`" in text or f"`{name}[]`" in text, name
