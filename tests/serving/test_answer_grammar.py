"""Grammars of tool calls and replies, followed by a model that chooses at random: whatever it says is valid."""

import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from llguidance import LLTokenizer

from appliance.errors import RequestError
from appliance.serving import answer_grammar
from appliance.serving.grammar import GrammarCompiler
from appliance.serving.requests import Grammar
from appliance.text.reasoning import THINK
from appliance.text.tool_call_parser import CallArguments, CallStarted, PlainText, ToolCallParser
from appliance.text.tool_calls import HERMES, LLAMA, MISTRAL, MISTRAL_ARGS, QWEN_XML, ToolFormat

FORMATS = (HERMES, QWEN_XML, LLAMA, MISTRAL, MISTRAL_ARGS)
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "d",
            "parameters": {
                "type": "object",
                "properties": {
                    "unit": {"type": "string", "enum": ["c", 'f"']},
                    "days": {"$ref": "#/$defs/days"},
                    "at": {"type": "string", "maxLength": 3, "contentMediaType": "x"},
                },
                "required": ["unit"],
                "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 12}},
            },
        },
    },
    {"type": "function", "function": {"name": "time"}},
]
SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
END = 256
# Makes random texts end.
FAVOURITES = b'"}],<>/\n'


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    tokenizer = LLTokenizer("byte")
    compiler = GrammarCompiler(lambda: tokenizer, np.array([tokenizer.eos_token]))
    yield compiler
    compiler.close()


def say(compiler: GrammarCompiler, grammar: Grammar, seed: int, free: bytes = b"") -> str:
    """What a random model says: `free` first, as far as it may, and then whatever the grammar admits."""
    gate = compiler.gate(compiler.compile(grammar), lambda token: bytes([token]))
    chance = random.Random(seed)
    said = bytearray()
    for byte in free:
        gate.accept(byte)
        said.append(byte)
    while len(said) < 2000 and (allowed := gate.allowed()) is not None:
        tokens = [int(token) for token in allowed]
        likely = [token for token in tokens if token >= END or token in FAVOURITES] if chance.random() < 0.7 else []
        token = chance.choice(likely or tokens)
        if token >= END:
            break
        gate.accept(token)
        said.append(token)
    return said.decode()


def called(form: ToolFormat, text: str) -> tuple[str, list[tuple[str, Any]]]:
    parser = ToolCallParser(form, TOOLS)
    pieces = [*parser.push(text), *parser.finish()]
    names = [piece.name for piece in pieces if isinstance(piece, CallStarted)]
    texts = ["".join(p.text for p in pieces if isinstance(p, CallArguments) and p.call == i) for i in range(len(names))]
    plain = "".join(piece.text for piece in pieces if isinstance(piece, PlainText))
    return plain, [(name, json.loads(text)) for name, text in zip(names, texts, strict=True)]


def check(calls: list[tuple[str, Any]]) -> None:
    for name, arguments in calls:
        if name == "time":
            assert arguments == {}
            continue
        assert arguments["unit"] in ("c", 'f"')
        assert arguments.keys() <= {"unit", "days", "at"}
        assert 1 <= arguments.get("days", 1) <= 12


# Text in the XML format has no length that a random model would ever keep to.
def tools_for(form: ToolFormat) -> list[dict[str, Any]]:
    if form.body != "xml":
        return TOOLS
    tools: list[dict[str, Any]] = json.loads(json.dumps(TOOLS))
    del tools[0]["function"]["parameters"]["properties"]["at"]
    return tools


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form.body} {form.marker}")
@pytest.mark.parametrize("is_parallel", [False, True])
def test_required_calls(compiler: GrammarCompiler, form: ToolFormat, is_parallel: bool) -> None:
    grammar = answer_grammar.required_calls(form, tools_for(form), is_parallel=is_parallel)
    counts = set()
    for seed in range(6):
        plain, calls = called(form, say(compiler, grammar, seed))
        assert plain == ""
        check(calls)
        counts.add(len(calls))
    assert min(counts) >= 1
    assert is_parallel or counts == {1}


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form.body} {form.marker}")
def test_lazy_calls_bind_what_follows_the_marker(compiler: GrammarCompiler, form: ToolFormat) -> None:
    grammar = answer_grammar.lazy_calls(form, tools_for(form), is_parallel=True)
    assert not grammar.is_last
    for seed in range(4):
        plain, calls = called(form, say(compiler, grammar, seed, free=b"I look. " + form.marker.encode()))
        assert plain == "I look."
        assert calls
        check(calls)
    assert answer_grammar.lazy_calls(form, TOOLS, is_parallel=False).is_last


def test_reply_or_calls(compiler: GrammarCompiler) -> None:
    reply = Grammar(kind="json_schema", source=json.dumps(SCHEMA))
    grammar = answer_grammar.calls_or(reply, HERMES, TOOLS, is_parallel=False)
    kinds = set()
    for seed in range(12):
        plain, calls = called(HERMES, say(compiler, grammar, seed))
        check(calls)
        kinds.add(bool(calls))
        assert calls or plain in ('{"ok": true}', '{"ok": false}')
    assert kinds == {False, True}
    with pytest.raises(RequestError, match="regex"):
        answer_grammar.calls_or(Grammar(kind="regex", source="a"), HERMES, TOOLS, is_parallel=False)


@pytest.mark.parametrize(
    "grammar",
    [
        answer_grammar.reply(Grammar(kind="json_schema", source=json.dumps(SCHEMA))),
        Grammar(kind="json_schema", source=json.dumps({**SCHEMA, "x-guidance": answer_grammar.SPACING})),
        Grammar(kind="lark", source='start: "{\\"ok\\": " ("true" | "false") "}"'),
    ],
    ids=["ours", "schema", "lark"],
)
def test_thinking_stays_free(compiler: GrammarCompiler, grammar: Grammar) -> None:
    after = answer_grammar.after_thinking(grammar, THINK)
    assert after.is_required
    assert after.is_last
    said = say(compiler, after, 1, free=b'Hm {"ok"? </think>')
    assert said.rpartition("</think>")[2].strip() in ('{"ok": true}', '{"ok": false}')


def test_strict_functions_are_not_made_looser(compiler: GrammarCompiler) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "string", "contentMediaType": "x"}}}
    for is_strict in (False, True):
        tool = {"type": "function", "function": {"name": "time", "parameters": parameters, "strict": is_strict}}
        grammar = answer_grammar.required_calls(HERMES, [tool], is_parallel=False)
        if not is_strict:
            compiler.compile(grammar)
            continue
        with pytest.raises(RequestError, match="contentMediaType"):
            compiler.compile(grammar)
