"""Tool calls in every format: found in answers however they were cut, never raised upon, and rendered for any template."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.text import tool_calls
from appliance.text.tool_call_parser import CallArguments, CallStarted, PlainText, ToolCallParser
from appliance.text.tool_calls import FALLBACK, HERMES, LLAMA, MISTRAL, MISTRAL_ARGS, QWEN_XML, ToolFormat

FORMATS = (HERMES, QWEN_XML, LLAMA, MISTRAL, MISTRAL_ARGS)
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    },
    {"type": "function", "function": {"name": "time"}},
]
Calls = list[tuple[str, Any]]


def parse(form: ToolFormat, pieces: list[str], *, is_single: bool = False) -> tuple[str, list[tuple[str, str]]]:
    """The text around the calls, and each call's name and JSON text."""
    parser = ToolCallParser(form, TOOLS, is_single=is_single)
    text, calls = "", []
    for piece in [each for pushed in [*map(parser.push, pieces), parser.finish()] for each in pushed]:
        match piece:
            case PlainText():
                text += piece.text
            case CallStarted():
                assert piece.call == len(calls)
                calls.append((piece.name, ""))
            case CallArguments():
                calls[piece.call] = (calls[piece.call][0], calls[piece.call][1] + piece.text)
    return text, calls


def written(form: ToolFormat, calls: Calls) -> str:
    """Calls as a model of this format writes them."""
    if form.body == "xml":
        return "\n".join(f"<tool_call>\n<function={name}>\n{_xml(args)}</function>\n</tool_call>" for name, args in calls)
    if form.body == "args":
        return "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(args)}" for name, args in calls)
    bodies = [json.dumps({"name": name, form.arguments_key: args}, ensure_ascii=False) for name, args in calls]
    if form == LLAMA:
        return "; ".join(bodies)
    return f"[TOOL_CALLS][{', '.join(bodies)}]" if form == MISTRAL else _hermes(bodies)


def _hermes(bodies: list[str]) -> str:
    return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


def _xml(args: dict[str, Any]) -> str:
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in args.items()}
    return "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in texts.items())


# "<" would end a parameter in the XML format, which has no way to write it otherwise.
WORDS = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="<"), max_size=20)
ARGUMENTS = st.fixed_dictionaries({"city": WORDS}, optional={"days": st.integers(), "more": st.lists(st.booleans())})
CALLS = st.lists(st.tuples(st.sampled_from(["weather"]), ARGUMENTS), min_size=1, max_size=3)
FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<function=weather>", "<parameter=city>", "</parameter>", "</function>", "{", "}"),
    *('"name": "weather"', '"arguments": {', '"parameters": ', ", ", '"', "\\", "[TOOL_CALLS]", "[", "]", "[ARGS]"),
    *("weather", ";", "<|python_tag|>", " ", "\n", "é😀", "5", "null", ":", '{"name": "time", "arguments": {"a": [1]}}'),
]
NOISE = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5), max_size=20).map("".join)


def cut(text: str, cuts: list[int]) -> list[str]:
    at = [0, *sorted(each % (len(text) + 1) for each in cuts), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(at)]


@given(form=st.sampled_from(FORMATS), calls=CALLS, cuts=st.lists(st.integers(0, 10_000), max_size=20))
def test_calls_round_trip(form: ToolFormat, calls: Calls, cuts: list[int]) -> None:
    text, found = parse(form, cut(written(form, calls), cuts))
    assert text == ""
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


@given(form=st.sampled_from(FORMATS), text=NOISE, cuts=st.lists(st.integers(0, 10_000), max_size=20))
def test_any_text_is_parsed_the_same_however_it_is_cut(form: ToolFormat, text: str, cuts: list[int]) -> None:
    whole = parse(form, [text])
    assert parse(form, cut(text, cuts)) == whole == parse(form, list(text))
    if not whole[1]:
        assert whole[0] == text


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        (HERMES, 'I look.\n<tool_call>{"name": "time", "arguments": {}}</tool_call>\n', ("I look.", [("time", "{}")])),
        (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "time"}', ("", [("time", '{"a": 1}')])),
        (HERMES, '<tool_call>{"name": "time"}</tool_call> Done. ', ("Done. ", [("time", "{}")])),
        (HERMES, '<tool_call>{"name": "time", "arguments": null}', ("", [("time", "{}")])),
        (HERMES, '<tool_call>{"name": "time", "arguments": "{\\"a\\": 1}"}', ("", [("time", '{"a": 1}')])),
        (HERMES, '<tool_call>{"name": "time", "arguments": {"a": "}', ("", [("time", '{"a": "}')])),
        (HERMES, '<tool_call>{"name": "rm", "arguments": {}}', ('<tool_call>{"name": "rm", "arguments": {}}', [])),
        (HERMES, '<tool_call> no <tool_call>{"name": "time"}', ("<tool_call> no", [("time", "{}")])),
        (HERMES, "2 <tool 3 ", ("2 <tool 3 ", [])),
        (LLAMA, '{"name": "Ada", "age": 36}', ('{"name": "Ada", "age": 36}', [])),
        (LLAMA, '{"name": "time"}', ('{"name": "time"}', [])),
        (LLAMA, '<|python_tag|>{"name": "time", "parameters": {}}', ("", [("time", "{}")])),
        (LLAMA, 'See {"name": "time", "parameters": {}}', ('See {"name": "time", "parameters": {}}', [])),
        (MISTRAL, '[{"name": "time", "arguments": {}, "id": "abc"}]', ("", [("time", "{}")])),
        (MISTRAL, "[1] is a source.", ("[1] is a source.", [])),
        (MISTRAL_ARGS, '[TOOL_CALLS]time[CALL_ID]123[ARGS]{"a": 1}', ("", [("time", '{"a": 1}')])),
        (QWEN_XML, "<tool_call><function=time></function></tool_call>", ("", [("time", "{}")])),
        (QWEN_XML, "<tool_call><function=rm>", ("<tool_call><function=rm>", [])),
    ],
)
def test_answers(form: ToolFormat, text: str, expected: tuple[str, Any]) -> None:
    assert parse(form, list(text)) == expected


def test_arguments_are_streamed_as_they_come() -> None:
    parser = ToolCallParser(HERMES, TOOLS)
    assert parser.push('<tool_call>\n{"name": "weather", "argum') == []
    assert parser.push('ents": {"city"') == [CallStarted(0, "weather"), CallArguments(0, '{"city"')]
    assert parser.push(': "Ghent"}}\n</tool_call>') == [CallArguments(0, ': "Ghent"}')]


def test_single_call_drops_the_rest() -> None:
    text = written(MISTRAL, [("time", {}), ("time", {})]) + " and more"
    assert parse(MISTRAL, [text], is_single=True) == ("", [("time", "{}")])


def test_xml_values_have_the_types_of_the_schema() -> None:
    body = "<parameter=city>\n12\n</parameter><parameter=days>\n12\n</parameter><parameter=x>\nNaN\n</parameter>"
    _, calls = parse(QWEN_XML, [f"<tool_call><function=weather>{body}</function>"])
    assert json.loads(calls[0][1]) == {"city": "12", "days": 12, "x": "NaN"}


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ messages }}", FALLBACK),
        ("{% if tools %}{{ tools }}<|tool_start|>{% endif %}", FALLBACK),
        ('{{ tools }}<tool_call>\\n{\\"name\\": <function-name>, "arguments"}', HERMES),
        ("{{ tools }}<tool_call>name\\n<arg_key>k</arg_key>", FALLBACK),
        ("{{ tools }}<tool_call>\\n<function=example>", QWEN_XML),
        ("{{ tools }}[TOOL_CALLS][", MISTRAL),
        ("{{ tools }}[TOOL_CALLS]name[ARGS]", MISTRAL_ARGS),
        ('{{ tools }}{"name": name, "parameters": p}<|start_header_id|>ipython', LLAMA),
    ],
)
def test_detection(template: str, form: ToolFormat) -> None:
    assert tool_calls.detect(template) == form


CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": "Time?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "time", "arguments": '{"zone": "é"}'}}],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    {"role": "tool", "tool_call_id": "call_2", "content": "12:00"},
]


def test_conversation_for_a_template_with_tools() -> None:
    shown = tool_calls.for_template(CONVERSATION, HERMES)
    assert shown[1]["content"] == ""
    assert shown[1]["tool_calls"][0]["function"] == {"name": "time", "arguments": {"zone": "é"}}
    assert shown[2]["tool_call_id"] == "call_1"
    mistral = tool_calls.for_template(CONVERSATION, MISTRAL)
    assert mistral[1]["tool_calls"][0]["id"] == mistral[2]["tool_call_id"] != mistral[3]["tool_call_id"]
    assert len(mistral[2]["tool_call_id"]) == 9
    assert CONVERSATION[1]["content"] is None


def test_arguments_that_were_cut_short_stay_text() -> None:
    function = {"name": "time", "arguments": '{"zone'}
    call = {"id": "1", "type": "function", "function": function}
    shown = tool_calls.for_template([{"role": "assistant", "content": "", "tool_calls": [call]}], HERMES)
    assert shown[0]["tool_calls"][0]["function"]["arguments"] == '{"zone'


def test_conversation_as_text_can_be_read_back() -> None:
    shown = tool_calls.as_text(CONVERSATION)
    assert [message["role"] for message in shown] == ["user", "assistant", "user"]
    assert parse(FALLBACK, [shown[1]["content"]]) == ("", [("time", '{"zone": "é"}')])
    assert shown[2]["content"].count("<tool_response>") == 2
    assert "tool_call_id" not in shown[2]
    assert '"weather"' in tool_calls.tools_text(TOOLS)
