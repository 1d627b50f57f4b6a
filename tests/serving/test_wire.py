"""Frames between the server and an engine's process: what goes in comes out, and nothing else is taken for a message."""

import itertools
import socket
import threading
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import EngineFailed, EnvironmentIncomplete
from appliance.serving import wire
from appliance.serving.events import Accepted, Finished, Load, StepStats, TextPiece, TokenLogprob
from appliance.serving.requests import (
    ChatPrompt,
    GenerationRequest,
    Grammar,
    PoolingRequest,
    SamplingSettings,
    TextPrompt,
    TokenPrompt,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
prompts = st.one_of(
    st.builds(TextPrompt, text=st.text()),
    st.builds(TokenPrompt, tokens=st.lists(st.integers(0, 2**31 - 1)).map(tuple)),
    st.builds(ChatPrompt, messages=st.lists(st.dictionaries(st.text(), json_values, max_size=3), max_size=3).map(tuple)),
)
generations = st.builds(
    GenerationRequest,
    id=st.text(),
    prompt=prompts,
    arrived_at=st.floats(0, 1e9),
    max_tokens=st.integers(1, 10_000),
    stop=st.lists(st.text(), max_size=4).map(tuple),
    sampling=st.builds(
        SamplingSettings, logit_bias=st.dictionaries(st.integers(0, 200_000), st.floats(-100, 100), max_size=3)
    ),
    grammar=st.none() | st.builds(Grammar, kind=st.just("regex"), source=st.text()),
)
poolings = st.builds(
    PoolingRequest,
    id=st.text(),
    inputs=st.lists(st.text() | st.lists(st.integers(0, 99), min_size=1).map(tuple), max_size=3).map(tuple),
    arrived_at=st.floats(0, 1e9),
    query=st.none() | st.text(),
)
pieces = st.builds(
    TextPiece,
    text=st.text(),
    logprobs=st.lists(st.builds(TokenLogprob, piece=st.binary(), logprob=st.floats(-50, 0)), max_size=2).map(tuple),
)
reports = st.builds(
    wire.Report,
    events=st.lists(st.tuples(st.text(), pieces), max_size=4),
    steps=st.just([StepStats(seconds=0.5, prompt_tokens=1, generated_tokens=2)]),
    load=st.just(Load(state="ready", running=1, waiting=2, slots=3)),
)


def through_a_socket(frames: bytes, decoder: wire.Decoder[wire.ToWorker]) -> list[wire.ToWorker]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        writer = threading.Thread(target=lambda: (ours.sendall(frames), ours.shutdown(socket.SHUT_WR)))
        writer.start()
        messages = []
        try:
            while (message := wire.receive(theirs, decoder)) is not None:
                messages.append(message)
        finally:
            writer.join()
    return messages


def in_pieces(frames: bytes, cuts: Iterable[int], decoder: wire.Decoder[wire.FromWorker]) -> list[wire.FromWorker]:
    cut = wire.Frames(decoder)
    ends = sorted({min(each, len(frames)) for each in cuts} | {len(frames)})
    return [message for start, end in itertools.pairwise([0, *ends]) for message in cut.messages(frames[start:end])]


@given(st.lists(generations | poolings, max_size=3))
def test_requests_arrive_as_they_were(requests: list[GenerationRequest | PoolingRequest]) -> None:
    frames = b"".join(map(wire.pack, requests))
    assert through_a_socket(frames, wire.TO_WORKER) == requests


@given(st.lists(reports, max_size=3), st.lists(st.integers(0, 500)))
def test_reports_arrive_as_they_were_however_they_are_cut(messages: list[wire.Report], cuts: list[int]) -> None:
    frames = b"".join(map(wire.pack, messages))
    assert in_pieces(frames, cuts, wire.FROM_WORKER) == messages


@given(st.integers(0, 200))
def test_a_frame_that_ends_too_early_is_the_end(length: int) -> None:
    message = wire.Report(
        events=[("a", Accepted(prompt_tokens=9)), ("a", Finished(reason="stop", prompt_tokens=9, generated_tokens=3))],
        load=Load(state="ready", running=0, waiting=0, slots=1),
    )
    frame = wire.pack(message)
    assert in_pieces(frame[: min(length, len(frame) - 1)], [], wire.FROM_WORKER) == []


@given(st.binary())
def test_what_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(wire.FrameBroken):
        wire.TO_WORKER.message(body)


def test_a_frame_may_not_announce_more_than_the_limit() -> None:
    with pytest.raises(wire.FrameBroken, match="limit"):
        through_a_socket(wire.HEADER.pack(wire.FRAME_BYTES + 1), wire.TO_WORKER)


def test_too_large_or_too_deep_a_message_is_not_packed() -> None:
    with pytest.raises(wire.FrameBroken, match="limit"):
        wire.pack(TextPrompt(text="x" * wire.FRAME_BYTES))
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(wire.FrameBroken, match="RecursionError"):
        wire.pack(ChatPrompt(messages=({"content": deep},)))


def test_a_refusal_to_load_keeps_its_class() -> None:
    refused = wire.LoadRefused(code="environment_incomplete", message="It needs 12 GB.")
    error = refused.error()
    assert type(error) is EnvironmentIncomplete
    assert error.exit_code == 3
    assert type(wire.LoadRefused(code="unheard of", message="?").error()) is EngineFailed
