"""Compiling grammars: what is refused, in what words, and how an answer is followed through one. No model needed."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from llguidance import LLTokenizer, TokenizerWrapper

from appliance.errors import RequestError
from appliance.serving import grammar_check
from appliance.serving.grammar import Gate, GrammarCompiler, GrammarStuck
from appliance.serving.requests import Grammar, GrammarKind

END = 256
PIECES = [*(bytes([byte]) for byte in range(256)), b"", b">\n", b">o", b">x", b"ok"]


class ByteTokens:
    """What llguidance asks of a tokenizer: bytes, an end token, and a few longer tokens."""

    eos_token_id, bos_token_id = END, None
    tokens = tuple(piece or b"\xff<end>" for piece in PIECES)
    special_token_ids = (END,)

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(lambda: LLTokenizer(TokenizerWrapper(ByteTokens())), np.array([END]))


def opened(compiler: GrammarCompiler, kind: GrammarKind, source: str, **how: Any) -> Gate:
    return compiler.gate(compiler.compile(Grammar(kind=kind, source=source, **how)), PIECES.__getitem__)


def say(gate: Gate, tokens: Sequence[int]) -> None:
    for token in tokens:
        allowed = gate.allowed()
        assert allowed is None or token in allowed
        assert gate.permits(token)
        gate.accept(token)


@pytest.mark.parametrize(
    ("kind", "source", "said"),
    [
        ("gbnf", 'root ::= "a', "gbnf grammar is refused: Unexpected end of input at line 1"),
        ("gbnf", "root ::= foo", "Rule 'foo' not found"),
        ("gbnf", "", "No 'root' rule"),
        ("gbnf", "root ::= root | root", "no text begins as it says"),
        ("gbnf", "root ::= " + "(" * 3000 + '"a"' + ")" * 3000, "nested too deeply"),
        ("gbnf", "root ::= " + '("a" | ("b" "c")*)+ ' * 1500, "too many do"),
        ("gbnf", "".join(f"r{number} ::= r{number + 1}\n" for number in range(1001)), "1001 rules; the limit is 1000"),
        ("lark", 'start: "a', "lark grammar is refused: 1"),
        ("lark", 'start: T\nT: T "a"', "circular reference"),
        ("lark", "start: " + "(" * 3000 + '"a"' + ")" * 3000, "too deeply nested"),
        ("lark", "start: a\n" * 1001, "1001 rules; the limit is 1000"),
        ("lark", 'start: %json {"uniqueItems": true}', "schema has 'uniqueItems'"),
        ("lark", "start: %json {oops}", "in the grammar is not JSON"),
        ("regex", "a(b", "unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", "a" * 140_000, "140000 bytes; the limit is 131072"),
        ("json_schema", "{", "is not JSON: .* at character 1"),
        ("json_schema", "[1]", "A JSON schema is an object"),
        ("json_schema", "[" * 60_000, "nested too deeply"),
        ("json_schema", '{"items":' * 1000 + "{}" + "}" * 1000, "too deeply|recursion limit"),
        ("json_schema", "false", "Unsatisfiable"),
        ("json_schema", '{"$ref": "#"}', "no text begins as it says"),
        ("json_schema", '{"$ref": "http://example.org/schema"}', "does not fetch"),
        ("json_schema", '{"type": "strange"}', "Invalid type: strange"),
        ("json_schema", '{"type": "string", "format": "colour"}', "Unknown format: colour"),
        ("json_schema", '{"type": "integer", "multipleOf": 99999989}', "multiply to 99999989; the limit is 10000"),
        ("json_schema", '{"allOf": [{"multipleOf": 907}, {"multipleOf": 0.0911}]}', "multiply to 826277"),
        ("json_schema", '{"type": "integer", "multipleOf": 0}', "no number above 0"),
    ],
)
def test_grammar_is_refused_in_words(compiler: GrammarCompiler, kind: GrammarKind, source: str, said: str) -> None:
    with pytest.raises(RequestError, match=said) as refused:
        compiler.compile(Grammar(kind=kind, source=source))
    assert len(str(refused.value)) < 500


def test_every_keyword_that_is_not_enforced_is_named(compiler: GrammarCompiler) -> None:
    schema = {
        "title": "fine",
        "x-note": "fine",
        "type": "object",
        "properties": {
            "nullable": {"type": "string", "nullable": True},
            "const": {"const": {"contains": "data, and no keyword"}},
            "list": {"type": "array", "items": {"not": {"type": "string"}}, "uniqueItems": True},
        },
        "$defs": {"a": {"anyOf": [{}, {"if": {}}]}},
    }
    with pytest.raises(RequestError) as refused:
        compiler.compile(Grammar(kind="json_schema", source=json.dumps(schema)))
    said = str(refused.value)
    for place, keyword in (
        ("schema.properties.nullable", "nullable"),
        ("schema.properties.list.items", "not"),
        ("schema.properties.list", "uniqueItems"),
        ("schema.$defs.a.anyOf[1]", "if"),
    ):
        assert f"{place} has {keyword!r}" in said
    assert said.count(" has ") == 4


def test_a_mistake_is_told_by_the_name_of_the_field(compiler: GrammarCompiler) -> None:
    source = 'start: answer\nanswer: %json {"type": "string", "pattern": "(a"}'
    with pytest.raises(RequestError, match=r"^response_format is refused: regex parse error[^%]*$") as caught:
        compiler.compile(Grammar(kind="lark", source=source, field="response_format"))
    assert caught.value.param == "response_format"


@pytest.mark.parametrize("name", ["lenient", "coerce_one_of", "json_allowed_escapes"])
def test_checks_cannot_be_switched_off(compiler: GrammarCompiler, name: str) -> None:
    for schema in ({"x-guidance": {name: True}}, {"items": {"x-guidance": {"whitespace_flexible": False}}}):
        with pytest.raises(RequestError, match=f"{name}|schema.items has 'x-guidance'"):
            compiler.compile(Grammar(kind="json_schema", source=json.dumps(schema)))


def test_list_of_keywords_is_that_of_llguidance(compiler: GrammarCompiler) -> None:
    """Whatever is let through binds: llguidance looks at its value."""
    lists = {"additionalItems", "items"}  # any value of these is taken for a schema
    for keyword in grammar_check.BINDING - {"const", "additionalProperties", "multipleOf", *lists}:
        with pytest.raises(RequestError, match="is refused"):
            compiler.compile(Grammar(kind="json_schema", source=json.dumps({keyword: {"x-wrong": 1.5}})))


@pytest.mark.parametrize("form", [{"items": 0}, {"allOf": [0]}, {"properties": {"a": 0}, "required": ["a"]}])
def test_long_chain_of_references_needs_no_more_stack_than_there_is(compiler: GrammarCompiler, form: Any) -> None:
    def link(target: int) -> str:
        return json.dumps(form, separators=(",", ":")).replace("0", f'{{"$ref":"#/$defs/{target}"}}')

    depth = 1900
    chain = ",".join(f'"{number}":{link(number + 1)}' for number in range(depth))
    source = f'{{"$ref":"#/$defs/0","$defs":{{{chain},"{depth}":{{"type":"string"}}}}}}'
    assert len(source) < grammar_check.MAX_SOURCE_BYTES
    compiler.compile(Grammar(kind="json_schema", source=source))


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("json_schema", {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(2000)}}),
        ("json_schema", {"enum": [f"a long enough value {number}" for number in range(3000)]}),
        ("json_schema", {"type": "string", "minLength": 10**6, "maxLength": 10**7}),
        (
            "json_schema",
            {"oneOf": [{"type": "object", "properties": {"k": {"const": f"k{n}"}}, "required": ["k"]} for n in range(100)]},
        ),
        ("json_schema", {"type": "number", "multipleOf": 0.25}),
        ("regex", "(((a{1,100}){1,100}){1,100}){1,100}"),
        ("regex", ".*a.{1000}"),
        ("lark", 'start: "a"{1,1000000}'),
        ("gbnf", "root ::= " + " | ".join(f'"word{number}"' for number in range(3000))),
    ],
)
def test_large_grammars_that_are_taken_can_be_followed(compiler: GrammarCompiler, kind: GrammarKind, source: Any) -> None:
    gate = opened(compiler, kind, source if isinstance(source, str) else json.dumps(source))
    try:
        for _ in range(40):
            allowed = gate.allowed()
            assert allowed is not None
            if allowed[0] == END:
                break
            gate.accept(int(allowed[len(allowed) // 2]))
    except GrammarStuck as stuck:
        assert "too many" in str(stuck).lower()  # noqa: PT017


def test_compiled_grammars_are_kept_and_answers_are_independent(compiler: GrammarCompiler) -> None:
    one, two = opened(compiler, "regex", "ab"), opened(compiler, "regex", "ab")
    say(one, b"ab")
    say(two, b"a")
    assert one.allowed().tolist() == [END]  # type: ignore[union-attr]
    assert two.allowed().tolist() == [ord("b")]  # type: ignore[union-attr]


def test_whole_answer_ends_with_the_grammar(compiler: GrammarCompiler) -> None:
    gate = opened(compiler, "regex", "ab?")
    say(gate, b"a")
    assert sorted(gate.allowed()) == [ord("b"), END]  # type: ignore[type-var, arg-type]
    assert gate.next_forced() is None
    say(gate, b"b")
    assert gate.next_forced() == END
    gate.accept(END)
    assert gate.next_forced() is None
    assert gate.allowed().tolist() == [END]  # type: ignore[union-attr]


def test_marker_may_span_tokens_and_come_again(compiler: GrammarCompiler) -> None:
    gate = opened(compiler, "regex", "ok", after="<<>", is_required=True)
    assert gate.allowed() is None
    say(gate, b"<<< free <<")
    assert gate.is_end_forbidden
    say(gate, b">")
    assert not gate.is_end_forbidden
    assert ord("x") not in gate.allowed()  # type: ignore[operator]
    say(gate, b"o")
    assert gate.next_forced() == ord("k")
    say(gate, b"k")
    assert gate.allowed() is None
    assert not gate.is_end_forbidden
    say(gate, b"<<>ok<<>")
    assert gate.allowed() is not None


def test_marker_may_end_inside_a_token(compiler: GrammarCompiler) -> None:
    gate = opened(compiler, "regex", "ok", after="<>")
    say(gate, b"<")
    newline, fits, wrong = PIECES.index(b">\n"), PIECES.index(b">o"), PIECES.index(b">x")
    assert [gate.permits(token) for token in (newline, fits, wrong, ord(">"), ord("x"))] == [False, True, False, True, True]
    gate.accept(fits)
    assert gate.allowed().tolist() == [ord("k")]  # type: ignore[union-attr]


def test_last_grammar_is_not_followed_by_free_text(compiler: GrammarCompiler) -> None:
    gate = opened(compiler, "regex", "ok", after="<>", is_last=True)
    say(gate, b"free <>ok")
    assert gate.next_forced() == END
    assert gate.allowed().tolist() == [END]  # type: ignore[union-attr]


def test_grammar_needs_an_end_token_and_a_marker_with_text(compiler: GrammarCompiler) -> None:
    with pytest.raises(RequestError, match="no token that ends an answer"):
        GrammarCompiler(lambda: LLTokenizer(TokenizerWrapper(ByteTokens())), np.array([])).compile(
            Grammar(kind="regex", source="a")
        )
    with pytest.raises(RequestError, match="marker is empty"):
        compiler.compile(Grammar(kind="regex", source="b", after=""))
