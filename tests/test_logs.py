"""The log: every call that the appliance makes becomes fields, whatever is put into them."""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance import logs

SOURCES = Path(__file__).resolve().parents[1] / "appliance"
CALL = re.compile(r"log(?:ger)?\.(?:debug|info|warning|error|exception|critical)\(\s*\"([^\"]*)\"")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_events_become_objects(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", "info")
    log = logging.getLogger("appliance.serving")
    log.info("event=answered request=%s seconds=%.3f tokens=%d code=%s", "chatcmpl-1", 0.12345678, 7, None)
    log.warning("event=snapshot_deleted file=%s reason=%r", Path("/x"), 'a "quoted"\nword')
    log.error("event=request_failed type=%s\n%s", "ValueError", "line 1\nline 2")
    log.debug("event=not_shown")
    logging.getLogger("some.library").warning("Invalid HTTP request: %s", "x")
    try:
        raise ValueError("inner")
    except ValueError:
        log.exception("event=step_failed")
    found: list[dict[str, Any]] = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time")) for line in found)
    assert "ValueError: inner" in found[-1].pop("exception")
    assert found == [
        {"level": "info", "event": "answered", "request": "chatcmpl-1", "seconds": 0.123457, "tokens": 7, "code": None},
        {"level": "warning", "event": "snapshot_deleted", "file": "/x", "reason": 'a "quoted"\nword'},
        {"level": "error", "event": "request_failed", "type": "ValueError", "detail": "line 1\nline 2"},
        {"level": "warning", "event": "log", "logger": "some.library", "message": "Invalid HTTP request: x"},
        {"level": "error", "event": "step_failed"},
    ]


def test_text_is_what_the_call_says(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("text", "warning")
    logging.getLogger("appliance.serving").warning("event=x key=%d", 3)
    logging.getLogger("appliance.serving").info("event=not_shown")
    assert capsys.readouterr().err == "event=x key=3\n"


def test_every_call_of_the_appliance_has_an_event_and_keys() -> None:
    sources = [path.read_text() for path in SOURCES.rglob("*.py") if path.name != "logs.py"]
    templates = [found for source in sources for found in CALL.findall(source)]
    assert len(templates) > 25
    for template in templates:
        assert re.match(r"event=[a-z_]+( |$|\\n)", template), template
        assert all(re.findall(r"(\w+=|\\n|)%[.\d]*[a-z]", template)), template


@given(st.lists(st.one_of(st.none(), st.text(), st.integers(), st.floats(), st.binary()), min_size=3, max_size=3))
def test_nothing_that_is_logged_breaks_the_line(values: list[Any]) -> None:
    template = "event=x a=%s b=%r c=%s"
    record = logging.LogRecord("appliance", logging.INFO, "", 0, template, tuple(values), None)
    line = logs.JsonFormatter().format(record)
    assert "\n" not in line
    assert {"time", "level", "event", "a", "b", "c"} == json.loads(line).keys()
