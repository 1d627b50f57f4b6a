"""A turn on an engine: what the engine is asked, and what its text becomes, however it was cut into pieces."""

import asyncio
import itertools
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import EngineFailed, QueueFull, RequestError
from appliance.recipe import Serve
from appliance.serving import chat_turn
from appliance.serving.chat_turn import (
    ChatTurn,
    ChoiceFinished,
    Content,
    Delta,
    Reasoning,
    ToolCallArguments,
    ToolCallStarted,
)
from appliance.serving.engine import EngineLease
from appliance.serving.events import Event, TextPiece, TokenLogprob
from appliance.serving.requests import GenerationRequest, Grammar
from tests.serving.fakes import MODEL, THINKING_MODEL, FakeEngine, breaks, ends, says

SERVE = Serve(max_tokens=33, deadline_seconds=60.0)
USER = {"role": "user", "content": "hi"}
TOOLS: tuple[dict[str, Any], ...] = tuple({"type": "function", "function": {"name": name}} for name in ("time", "rain"))
CALL = '<tool_call>\n{"name": "time", "arguments": {"zone": "é"}}\n</tool_call>'
SCHEMA = Grammar(kind="json_schema", source='{"type": "object"}')


def turn(**fields: Any) -> ChatTurn:
    return ChatTurn(messages=(USER,), **fields)


async def deltas(engine: FakeEngine, asked: ChatTurn) -> list[Delta]:
    lease = EngineLease(engine=engine, name="fake:polite", adapter="polite")
    answer = await chat_turn.start(lease, asked, serve=SERVE, request_id="r", arrived_at=5.0, tenant="me")
    return [delta async for delta in answer]


def ask(engine: FakeEngine, asked: ChatTurn) -> list[Delta]:
    return asyncio.run(asyncio.wait_for(deltas(engine, asked), timeout=20))


def request(asked: ChatTurn, **engine: Any) -> GenerationRequest:
    """What the engine is asked."""
    fake = FakeEngine(lambda asked: [ends(index=i) for i in range(asked.n)], **{"model": THINKING_MODEL, **engine})
    ask(fake, asked)
    return fake.requests[0]


def grammar(asked: ChatTurn, **engine: Any) -> Grammar:
    found = request(asked, **engine).grammar
    assert found is not None
    return found


def told(said: list[Delta], index: int = 0) -> tuple[str, str, list[tuple[str, str]], str]:
    """Reasoning, content, calls and reason of one answer."""
    mine = [delta for delta in said if delta.index == index]
    calls = [(delta.name, "") for delta in mine if isinstance(delta, ToolCallStarted)]
    for delta in mine:
        if isinstance(delta, ToolCallArguments):
            name, arguments = calls[delta.call]
            calls[delta.call] = (name, arguments + delta.text)
    thought = "".join(delta.text for delta in mine if isinstance(delta, Reasoning))
    content = "".join(delta.text for delta in mine if isinstance(delta, Content))
    finished = mine[-1]
    assert isinstance(finished, ChoiceFinished)
    return thought, content, calls, finished.reason


def test_request_has_everything_that_was_asked() -> None:
    asked = request(turn(stop=("end",), n=2, top_logprobs=3, ignore_end=True, template_variables={"a": 1}))
    assert (asked.id, asked.tenant, asked.adapter, asked.arrived_at) == ("r", "me", "polite", 5.0)
    assert (asked.max_tokens, asked.deadline_at, asked.n, asked.stop) == (33, 65.0, 2, ("end",))
    assert (asked.top_logprobs, asked.ignore_end, asked.grammar) == (3, True, None)
    assert asked.prompt.messages == (USER,)  # type: ignore[union-attr]
    assert asked.prompt.template_variables == {"a": 1}  # type: ignore[union-attr]


@pytest.mark.parametrize(("seconds", "deadline"), [(7.0, 12.0), (1000.0, 65.0)])
def test_client_may_shorten_the_deadline(seconds: float, deadline: float) -> None:
    assert request(turn(deadline_seconds=seconds)).deadline_at == deadline


def test_plain_answer_is_not_touched() -> None:
    assert told(ask(FakeEngine(says(" Hel", "lo. \n")), turn())) == ("", " Hello. \n", [], "stop")


def test_thinking_and_calls_are_told_apart() -> None:
    engine = FakeEngine(says("<think>\nH", "m.\n</th", "ink>\n\nI look.\n", CALL), model=THINKING_MODEL)
    said = ask(engine, turn(tools=TOOLS))
    assert told(said) == ("Hm.", "I look.", [("time", '{"zone": "é"}')], "tool_calls")
    assert said[-1] == ChoiceFinished(0, "tool_calls", ends(generated_tokens=5), reasoning_tokens=3)


def test_thinking_that_the_prompt_began() -> None:
    engine = FakeEngine(says("Hm.\n</think>\nYes."), model=THINKING_MODEL, opening="<think>\n")
    assert told(ask(engine, turn()))[:2] == ("Hm.", "Yes.")


def test_calls_are_text_where_no_tools_may_be_called() -> None:
    for asked in (turn(), turn(tools=TOOLS, tool_choice="none")):
        assert told(ask(FakeEngine(says(CALL)), asked)) == ("", CALL, [], "stop")
    assert request(turn(tools=TOOLS, tool_choice="none")).prompt.tools == ()  # type: ignore[union-attr]


def test_only_one_call_unless_parallel() -> None:
    engine = FakeEngine(says(f"{CALL}\n{CALL}"))
    assert len(told(ask(engine, turn(tools=TOOLS)))[2]) == 2
    assert len(told(ask(engine, turn(tools=TOOLS, parallel_tool_calls=False)))[2]) == 1


def test_a_call_that_was_cut_says_so() -> None:
    engine = FakeEngine(says('<tool_call>\n{"name": "time", "arguments": {"zo', reason="length"))
    assert told(ask(engine, turn(tools=TOOLS))) == ("", "", [("time", '{"zo')], "length")


def test_several_answers_keep_apart() -> None:
    script: list[Event] = [
        TextPiece(text="<think>a", index=0),
        TextPiece(text="b", index=1),
        TextPiece(text="</think>c", index=0),
        ends(index=1),
        ends("length", index=0),
    ]
    said = ask(FakeEngine(script), turn(n=2))
    assert told(said, 0) == ("a", "c", [], "length")
    assert told(said, 1) == ("", "b", [], "stop")


PARTS = st.sampled_from(
    ["<think>", "</think>", CALL, "<tool_", "call>", '{"name": "rain", "arguments": {}}', "é😀", " \n", "x"]
)


@given(text=st.lists(PARTS | st.text(max_size=4), max_size=8).map("".join), cuts=st.lists(st.integers(0, 200), max_size=12))
def test_stream_says_the_same_however_it_is_cut(text: str, cuts: list[int]) -> None:
    at = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(at)]
    asked = turn(tools=TOOLS)
    assert told(ask(FakeEngine(says(*pieces)), asked)) == told(ask(FakeEngine(says(text)), asked))


def test_logprobs_are_those_of_the_content() -> None:
    texts = ["<think>", "Hm.", "</think>", "Yes", ", <", "b", CALL]
    probabilities = [TokenLogprob(piece=text.encode(), logprob=-0.5) for text in texts]
    script = [TextPiece(text=text, logprobs=(each,)) for text, each in zip(texts, probabilities, strict=True)]
    said = ask(FakeEngine([*script, ends()], model=THINKING_MODEL), turn(tools=TOOLS, top_logprobs=0))
    content = [delta for delta in said if isinstance(delta, Content)]
    assert "".join(delta.text for delta in content) == "Yes, <b"
    assert [each.piece for delta in content for each in delta.logprobs] == [b"Yes", b", <", b"b"]


def test_logprobs_without_text_are_told() -> None:
    last = TokenLogprob(piece=b"", logprob=-1.0)
    said = ask(FakeEngine([TextPiece(text="", logprobs=(last,)), ends()]), turn(top_logprobs=0))
    assert said[0] == Content(0, "", (last,))


def test_unbound_turns_have_no_grammar() -> None:
    assert request(turn()).grammar is None
    assert request(turn(tools=TOOLS, tool_choice="none")).grammar is None


def test_tools_that_may_be_called_bind_what_follows_the_marker() -> None:
    bound = grammar(turn(tools=TOOLS))
    assert (bound.after, bound.is_required, bound.is_last) == ("<tool_call>", False, False)
    assert grammar(turn(tools=TOOLS, parallel_tool_calls=False)).is_last


def test_required_and_named_calls_bind_the_whole_answer() -> None:
    off = {"enable_thinking": False}
    bound = grammar(turn(tools=TOOLS, tool_choice="required", template_variables=off))
    assert bound.after is None
    assert "time" in bound.source
    assert "rain" in bound.source
    assert "time" not in grammar(turn(tools=TOOLS, tool_choice="required", named_tool="rain")).source


@pytest.mark.parametrize(
    ("model", "opening", "variables", "is_thinking"),
    [
        (MODEL, "", {}, False),
        (THINKING_MODEL, "", {}, True),
        (THINKING_MODEL, "", {"enable_thinking": False}, False),
        (THINKING_MODEL, "<think>\n", {}, True),
        (msgspec.structs.replace(MODEL, chat_template="</think>"), "", {}, False),
        (msgspec.structs.replace(MODEL, chat_template="</think>"), "<think>", {}, True),
    ],
)
def test_structured_answers_leave_thinking_free(model: Any, opening: str, variables: Any, is_thinking: bool) -> None:
    for fields in ({"response_grammar": SCHEMA}, {"tools": TOOLS, "tool_choice": "required"}):
        bound = grammar(turn(**fields, template_variables=variables), model=model, opening=opening)
        expected = ("</think>", True, True) if is_thinking else (None, False, False)
        assert (bound.after, bound.is_required, bound.is_last) == expected


def test_schema_or_call() -> None:
    bound = grammar(turn(tools=TOOLS, response_grammar=SCHEMA), model=MODEL)
    assert "reply | calls" in bound.source
    with pytest.raises(RequestError, match="regex"):
        request(turn(tools=TOOLS, response_grammar=Grammar(kind="regex", source="a")))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tool_choice": "required"}, "tools is empty"),
        ({"tool_choice": "required", "named_tool": "snow", "tools": TOOLS}, "not among the tools"),
    ],
)
def test_choices_that_cannot_be_made(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        request(turn(**fields))


def test_effort_becomes_what_the_template_knows() -> None:
    def variables(effort: str, template: str) -> Any:
        model = msgspec.structs.replace(MODEL, chat_template=template)
        return request(turn(reasoning_effort=effort), model=model).prompt.template_variables  # type: ignore[union-attr]

    assert variables("none", "enable_thinking") == {"enable_thinking": False}
    assert variables("high", "enable_thinking") == {"enable_thinking": True}
    assert variables("high", "reasoning_effort") == {"reasoning_effort": "high"}
    with pytest.raises(RequestError, match="no switch"):
        variables("low", "{{ messages }}")


def test_refusals_and_failures_are_raised() -> None:
    engine = FakeEngine(breaks("Hel"))
    with pytest.raises(EngineFailed):
        ask(engine, turn())
    engine.refusal = QueueFull("Full.", retry_after_seconds=7)
    with pytest.raises(QueueFull):
        ask(engine, turn())


def test_cancelling() -> None:
    async def go(engine: FakeEngine) -> Delta:
        lease = EngineLease(engine=engine, name="fake")
        answer = await chat_turn.start(lease, turn(), serve=SERVE, request_id="r", arrived_at=0.0, tenant="")
        assert (engine.running, answer.accepted.prompt_tokens) == (1, 2)
        answer.cancel()
        return [delta async for delta in answer][-1]

    engine = FakeEngine([TextPiece(text="Hel")])
    last = asyncio.run(asyncio.wait_for(go(engine), timeout=20))
    assert isinstance(last, ChoiceFinished)
    assert (last.reason, engine.cancelled, engine.running) == ("cancelled", 1, 0)


def test_reasoning_tokens_are_unknown_when_the_engine_has_gone() -> None:
    engine = FakeEngine(says("<think>a</think>b"))

    async def go() -> Delta:
        lease = EngineLease(engine=engine, name="fake")
        answer = await chat_turn.start(lease, turn(), serve=SERVE, request_id="r", arrived_at=0.0, tenant="")
        engine.refusal = EngineFailed("Gone.")
        return [delta async for delta in answer][-1]

    last = asyncio.run(go())
    assert isinstance(last, ChoiceFinished)
    assert last.reasoning_tokens is None


def test_arguments_are_json() -> None:
    ((_, arguments),) = told(ask(FakeEngine(says(CALL)), turn(tools=TOOLS)))[2]
    assert json.loads(arguments) == {"zone": "é"}


def test_a_model_that_cannot_think_need_not_be_told_not_to() -> None:
    assert request(turn(reasoning_effort="none"), model=MODEL).prompt.template_variables == {}  # type: ignore[union-attr]
    always = msgspec.structs.replace(MODEL, chat_template="{{ messages }}<think>")
    with pytest.raises(RequestError, match="no switch"):
        request(turn(reasoning_effort="none"), model=always)
