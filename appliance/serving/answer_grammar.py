"""What binds an answer: tool calls that must or may be made, a response format, and thinking that stays free.

The grammars are Lark as llguidance reads it (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md).
Knows nothing of HTTP or engines.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from appliance.errors import RequestError
from appliance.serving.grammar_check import BINDING, OPTIONS, SCHEMAS, SCHEMAS_BY_NAME
from appliance.serving.requests import Grammar
from appliance.text.reasoning import Markers
from appliance.text.tool_calls import MISTRAL, ToolFormat

RESPONSE, TOOLS = "response_format", "tools"  # fields that errors name
MAX_CALLS = 16  # in one answer
# JSON as training data and chat templates spell it: free white space would let a small model write nothing else.
SPACING: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Those that llguidance enforces (docs/json_schema.md).
_FORMATS = frozenset(("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"))
_START = "start: answer\n"
_OPEN_ENDED = ("additionalProperties", "patternProperties", "unevaluatedProperties", "$ref", "allOf", "anyOf", "oneOf")


def reply(grammar: Grammar) -> Grammar:
    """The answer is what `grammar` says. A schema becomes a grammar of its own, with the spacing that models are used to."""
    if grammar.kind != "json_schema":
        return grammar
    return _bound("reply", [_reply(grammar)], grammar.field or RESPONSE)


def required_calls(form: ToolFormat, tools: Sequence[Mapping[str, Any]], *, is_parallel: bool) -> Grammar:
    """The answer is one of these calls, or several."""
    return _bound("calls", _calls(form, tools, is_parallel), TOOLS)


def calls_or(grammar: Grammar, form: ToolFormat, tools: Sequence[Mapping[str, Any]], *, is_parallel: bool) -> Grammar:
    """The answer is calls, or what `grammar` says."""
    if grammar.kind != "json_schema":
        raise RequestError(
            f"An answer cannot be bound by a {grammar.kind} grammar while tools may be called; leave out one of the two, "
            "or use a JSON schema.",
            param="tools",
        )
    return _bound(
        "reply | calls", [_reply(grammar), *_calls(form, tools, is_parallel)], f"{grammar.field or RESPONSE}, {TOOLS}"
    )


def lazy_calls(form: ToolFormat, tools: Sequence[Mapping[str, Any]], *, is_parallel: bool) -> Grammar:
    """The answer is free, and once it begins a call, that is one of these."""
    closing = f" {_literal(form.closing)}" if form.closing else ""
    match form.body:
        case "args":
            start = "body"
        case "xml":
            start = rf'SPACE? body "\n"{closing}'
        case "json" if form.marker == MISTRAL.marker:
            start = f'SPACE? "[" {_several("body", ", ", is_parallel)}{closing}'
        case "json":
            start = f"SPACE? body SPACE?{closing}" if closing else "SPACE? body"
    rules = [f"start: {start}", r"SPACE: /[ \n]{1,2}/", *_bodies(form, tools)]
    return Grammar(kind="lark", source="\n".join(rules), field=TOOLS, after=form.marker, is_last=not is_parallel)


def after_thinking(grammar: Grammar, markers: Markers) -> Grammar:
    """The same for an answer that begins with free thinking."""
    source = grammar.source
    if source.startswith(_START):
        source = f"start: THINKING_GAP? answer\nTHINKING_GAP: /[ \\n]{{1,4}}/\n{source.removeprefix(_START)}"
    return msgspec.structs.replace(grammar, source=source, after=markers.closing, is_required=True, is_last=True)


def _bound(answer: str, rules: Sequence[str], field: str) -> Grammar:
    return Grammar(kind="lark", source="\n".join([f"{_START}answer: {answer}", *rules]), field=field)


def _reply(grammar: Grammar) -> str:
    return f"reply: %json {_schema_text(json.loads(grammar.source))}"


def _calls(form: ToolFormat, tools: Sequence[Mapping[str, Any]], is_parallel: bool) -> list[str]:
    bodies = _bodies(form, tools)
    if form.body == "args":
        return [f"calls: {_several('one', '', is_parallel)}", f"one: {_literal(form.marker)} body", *bodies]
    if form.marker == MISTRAL.marker:
        inner = _several("body", ", ", is_parallel)
        return [f"calls: {_literal(form.marker + '[')} {inner} {_literal(form.closing)}", *bodies]
    if not form.closing:
        return ["calls: body", *bodies]
    opening, closing = _literal(f"{form.marker}\n"), _literal(f"\n{form.closing}")
    return [f"calls: {_several('one', chr(10), is_parallel)}", f"one: {opening} body {closing}", *bodies]


def _several(rule: str, separator: str, is_parallel: bool) -> str:
    if not is_parallel:
        return rule
    return f"{rule} ({_literal(separator) if separator else ''} {rule}){{0,{MAX_CALLS - 1}}}"


def _bodies(form: ToolFormat, tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rules for `body`: a call of any of the tools, without what is around it."""
    functions = [tool["function"] for tool in tools]
    rules = ["body: " + " | ".join(f"call_{i}" for i in range(len(functions)))]
    for i, function in enumerate(functions):
        schema = _arguments_schema(function)
        if form.body == "xml":
            rules += _xml_rules(i, function["name"], schema)
            continue
        name = function["name"]
        head = f"{name}[ARGS]" if form.body == "args" else f'{{"name": "{name}", "{form.arguments_key}": '
        tail = "" if form.body == "args" else ' "}"'
        rules += [f"call_{i}: {_literal(head)} args_{i}{tail}", f"args_{i}: %json {_schema_text(schema)}"]
    return rules


def _xml_rules(i: int, name: str, schema: Mapping[str, Any]) -> list[str]:
    """The parameters in the order of the schema; text is free up to the tag that closes it, the rest is JSON."""
    required = schema.get("required", ())
    parts, rules = [], []
    for j, (key, value) in enumerate(schema.get("properties", {}).items()):
        rule = f"value_{i}_{j}"
        opening = _literal(f"<parameter={key}>\n")
        parts.append(f"{opening} {rule}" if key in required else f"({opening} {rule})?")
        is_text = isinstance(value, dict) and value.get("type") == "string"
        if is_text and "enum" in value:
            choices = " | ".join(_literal(f"{choice}\n</parameter>\n") for choice in value["enum"])
            rules.append(f"{rule}: {choices}")
        elif is_text:
            rules.append(rf"{rule}[lazy]: /(.|\n)*\n<\/parameter>\n/")
        else:
            shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
            inner = {**(value if isinstance(value, dict) else {}), **shared}
            rules.append(f"{rule}: json_{i}_{j} {_literal(chr(10) + '</parameter>' + chr(10))}")
            rules.append(f"json_{i}_{j}: %json {_schema_text(inner)}")
    return [f"call_{i}: {' '.join([_literal(f'<function={name}>' + chr(10)), *parts, _literal('</function>')])}", *rules]


def _arguments_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """What cannot be enforced is left out, unless the function is strict: then the engine refuses it by name.

    Arguments that the schema does not name are not admitted unless it speaks of them.
    """
    schema = {"properties": {}, **(function.get("parameters") or {}), "type": "object"}
    if not function.get("strict"):
        schema = _enforceable(schema)
    if not any(key in schema for key in _OPEN_ENDED):
        schema["additionalProperties"] = False
    return schema


def _enforceable(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if key in SCHEMAS_BY_NAME and isinstance(value, dict):
            kept[key] = {name: _enforceable(each) for name, each in value.items()}
        elif key in SCHEMAS:
            name = "anyOf" if key == "oneOf" else key  # that exactly one fits cannot be enforced in general
            kept[name] = [_enforceable(each) for each in value] if isinstance(value, list) else _enforceable(value)
        elif key in BINDING and (key != "format" or value in _FORMATS):
            kept[key] = value
    return kept


def _schema_text(schema: Mapping[str, Any]) -> str:
    return json.dumps({**schema, OPTIONS: SPACING}, ensure_ascii=False)


def _literal(text: str) -> str:
    """As a Lark string."""
    return json.dumps(text, ensure_ascii=False)
