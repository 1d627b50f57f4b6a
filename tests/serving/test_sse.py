"""Bodies survive the trip through server-sent events."""

from hypothesis import given
from hypothesis import strategies as st

from appliance.serving import sse


@given(st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=20)), max_size=5))
def test_round_trip(bodies: list[dict[str, str]]) -> None:
    stream = b"".join(map(sse.encode, bodies)) + sse.DONE + sse.encode({"after": "done"})
    assert list(sse.decode(stream.decode().split("\n"))) == bodies


def test_comments_and_other_fields_are_skipped() -> None:
    assert list(sse.decode([": still waiting", "event: x", 'data:{"a": 1}', ""])) == [{"a": 1}]
