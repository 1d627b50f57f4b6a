"""Text comes out the same however its bytes were cut, and never contains a stop string."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.serving.text_stream import TextStream

stops = st.lists(st.text(alphabet="abé€😀\n", min_size=1, max_size=4), max_size=3)
texts = st.text(alphabet="abé€😀\n ", max_size=40)
noise = st.binary(max_size=40)


def run(pieces: Sequence[bytes], stop: Sequence[str] = ()) -> tuple[str, bool]:
    stream = TextStream(stop)
    text = "".join(stream.push(piece) for piece in pieces)
    return text + stream.finish(), stream.is_stopped


def cut(data: bytes, at: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted(each % (len(data) + 1) for each in at), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@given(texts.map(str.encode) | noise, stops, st.lists(st.integers(0, 200), max_size=12))
def test_result_does_not_depend_on_how_the_bytes_arrive(data: bytes, stop: list[str], at: list[int]) -> None:
    assert run(cut(data, at), stop) == run([data], stop) == run([bytes([byte]) for byte in data], stop)


@given(texts, stops, st.lists(st.integers(0, 200), max_size=12))
def test_text_ends_where_the_first_stop_string_begins(text: str, stop: list[str], at: list[int]) -> None:
    out, is_stopped = run(cut(text.encode(), at), stop)
    complete = [end for end in range(len(text) + 1) if any(text[:end].endswith(each) for each in stop)]
    assert is_stopped == bool(complete)
    if complete:
        before = text[: complete[0]]
        assert out == min((before[: -len(each)] for each in stop if before.endswith(each)), key=len)
    else:
        assert out == text


@given(texts, stops)
def test_only_what_may_become_a_stop_string_is_held_back(text: str, stop: list[str]) -> None:
    stream = TextStream(stop)
    out = stream.push(text.encode())
    if not stream.is_stopped:
        held = text[len(out) :]
        assert not held or any(each.startswith(held) and each != held for each in stop)


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([b"caf\xc3", b"\xa9"], "café"),
        ([b"a\xff", b"b"], "a�b"),
        ([b"a\xe2\x82"], "a"),  # cut by max_tokens inside a character
    ],
)
def test_characters(pieces: list[bytes], expected: str) -> None:
    assert run(pieces) == (expected, False)
