"""What a grammar may ask for: limits on its size, and the JSON-schema keywords that can be enforced.

llguidance ignores keywords that it does not know, and a few grammars take it minutes, or more stack than a thread has: these
are refused here, before it sees them. Knows nothing of tokens.
"""

import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from appliance.errors import RequestError, several
from appliance.serving.requests import Grammar

MAX_SOURCE_BYTES = 128 * 1024
MAX_RULES = 1000  # a chain of so many takes 6 seconds, and time grows with the square
MAX_MULTIPLE = 10_000  # llguidance keeps a state for each remainder, 100 million of them if asked to

# llguidance's lists (its docs/json_schema.md).
BINDING = frozenset(
    (
        "$ref",
        "additionalItems",
        "additionalProperties",
        "allOf",
        "anyOf",
        "const",
        "enum",
        "exclusiveMaximum",
        "exclusiveMinimum",
        "format",
        "items",
        "maxItems",
        "maxLength",
        "maxProperties",
        "maximum",
        "minItems",
        "minLength",
        "minProperties",
        "minimum",
        "multipleOf",
        "oneOf",
        "pattern",
        "patternProperties",
        "prefixItems",
        "properties",
        "required",
        "type",
    )
)
ANNOTATIONS = frozenset(
    (
        "$anchor",
        "$comment",
        "$defs",
        "$id",
        "$schema",
        "default",
        "definitions",
        "deprecated",
        "description",
        "discriminator",
        "example",
        "examples",
        "id",
        "readOnly",
        "title",
        "writeOnly",
    )
)
EXTENSION = "x-"
OPTIONS = "x-guidance"
HARMLESS_OPTIONS = frozenset(("item_separator", "key_separator", "whitespace_flexible", "whitespace_pattern"))
SCHEMAS_BY_NAME = frozenset(("$defs", "definitions", "patternProperties", "properties"))
SCHEMAS = frozenset(("additionalItems", "additionalProperties", "allOf", "anyOf", "items", "oneOf", "prefixItems"))
MOST_TOLD = 5

_EMBEDDED_SCHEMA = re.compile(r"%json\s*")
_LARK_RULE = re.compile(r"(?m)^\s*[!?]?[A-Za-z_]\w*(\[[^\]]*\])?\s*:")


def check(grammar: Grammar) -> None:
    """Raises `RequestError` saying what is too much, or which keywords could not be enforced, and where they stand."""
    size = len(grammar.source.encode())
    if size > MAX_SOURCE_BYTES:
        raise RequestError(f"The grammar has {size} bytes; the limit is {MAX_SOURCE_BYTES}. Give a smaller one.")
    if grammar.after == "":
        raise RequestError("The grammar's marker is empty; name the text after which the grammar binds.")
    rules = 0
    if grammar.kind == "json_schema":
        _check_schema(_parsed(grammar.source))
    elif grammar.kind == "lark":
        rules = len(_LARK_RULE.findall(grammar.source))
        for schema in _embedded(grammar.source):
            _check_schema(schema)
    elif grammar.kind == "gbnf":
        rules = grammar.source.count("::=")
    if rules > MAX_RULES:
        raise RequestError(f"The grammar has {rules} rules; the limit is {MAX_RULES}. Give a simpler one.")


def _parsed(source: str) -> object:
    try:
        return json.loads(source)
    except json.JSONDecodeError as error:
        raise RequestError(f"The JSON schema is not JSON: {error.msg} at character {error.pos}.") from None
    except RecursionError:
        raise RequestError("The JSON schema is nested too deeply; give a flatter one.") from None


def _embedded(source: str) -> Iterator[object]:
    """The JSON schemas inside a Lark grammar."""
    at = 0
    while found := _EMBEDDED_SCHEMA.search(source, at):
        try:
            schema, at = json.JSONDecoder().raw_decode(source, found.end())
        except json.JSONDecodeError as error:
            raise RequestError(f"A JSON schema in the grammar is not JSON: {error.msg} at character {error.pos}.") from None
        except RecursionError:
            raise RequestError("A JSON schema in the grammar is nested too deeply; give a flatter one.") from None
        yield schema


def _check_schema(schema: object) -> None:
    if not isinstance(schema, dict | bool):
        raise RequestError('A JSON schema is an object, for example {"type": "object"}.')
    multiples: set[int] = set()
    problems = []
    if isinstance(schema, dict):
        problems = [f"{OPTIONS} has {name!r}" for name in sorted(_options(schema) - HARMLESS_OPTIONS)]
        problems += dict.fromkeys(_problems(schema, "schema", multiples))
    if problems:
        raise RequestError(several(problems[:MOST_TOLD], "The JSON schema asks for what cannot be enforced; remove it"))
    if math.prod(multiples) > MAX_MULTIPLE:
        raise RequestError(
            f"The digits of the schema's multipleOf multiply to {math.prod(multiples)}; the limit is {MAX_MULTIPLE}. "
            "Check divisibility after the answer instead."
        )


def _options(schema: dict[str, Any]) -> set[str]:
    options = schema.get(OPTIONS, {})
    return set(options) if isinstance(options, dict) else {str(options)}


def _problems(schema: object, place: str, multiples: set[int]) -> Iterator[str]:
    """What cannot be enforced; collects the digits of `multipleOf` (3 for 0.03)."""
    if not isinstance(schema, dict):
        return
    for keyword, value in schema.items():
        is_known = keyword in BINDING or keyword in ANNOTATIONS or keyword.startswith(EXTENSION)
        if not is_known or (keyword == OPTIONS and place != "schema"):
            yield f"{place} has {keyword!r}"
        elif keyword == "multipleOf":
            yield from _multiple(value, place, multiples)
        elif keyword in SCHEMAS_BY_NAME and isinstance(value, dict):
            for name, each in value.items():
                yield from _problems(each, f"{place}.{keyword}.{name}", multiples)
        elif keyword in SCHEMAS and isinstance(value, list):
            for number, each in enumerate(value):
                yield from _problems(each, f"{place}.{keyword}[{number}]", multiples)
        elif keyword in SCHEMAS:
            yield from _problems(value, f"{place}.{keyword}", multiples)


def _multiple(value: object, place: str, multiples: set[int]) -> Iterator[str]:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        yield f"{place} has a multipleOf that is no number above 0"
        return
    digits = Decimal(str(value)).normalize().as_tuple().digits
    multiples.add(int("".join(map(str, digits))))
