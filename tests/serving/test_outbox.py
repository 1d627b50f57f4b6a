"""What the engine tells leaves in order and whole, whoever writes it, and nobody who computes waits for the socket."""

import socket
import threading
from collections.abc import Iterator

import pytest

from appliance.serving import outbox, wire
from appliance.serving.events import Load, StepStats, TextPiece
from appliance.serving.outbox import Outbox

LOAD = Load(state="ready", running=0, waiting=0, slots=1)
FIRST = wire.Pong(at=0.0, load=LOAD)


class Ends:
    """An outbox, and the other end of its socket."""

    def __init__(self) -> None:
        ours, self.theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.theirs.settimeout(20)
        self.outbox = Outbox(ours)

    def start(self) -> None:
        self.outbox.start(FIRST, lambda: LOAD)
        assert self.read() == FIRST

    def read(self) -> wire.FromWorker | None:
        return wire.receive(self.theirs, wire.FROM_WORKER)

    def texts(self, count: int) -> list[str]:
        found: list[str] = []
        while len(found) < count:
            message = self.read()
            assert isinstance(message, wire.Report)
            found += [event.text for _, event in message.events if isinstance(event, TextPiece)]
        return found


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.theirs.close()


def test_nothing_leaves_before_the_first_message(ends: Ends) -> None:
    ends.outbox.deliver("a", TextPiece(text="early"))
    ends.outbox.flush()
    ends.start()
    assert ends.texts(1) == ["early"]


def test_who_flushes_does_not_wait_for_the_socket(ends: Ends) -> None:
    ends.start()
    sent = [f"{number} " * 500 for number in range(200)]  # far more than the socket takes
    for text in sent:
        ends.outbox.deliver("a", TextPiece(text=text))
        ends.outbox.flush()
    assert ends.texts(200) == sent
    ends.outbox.deliver("a", TextPiece(text="afterwards"))
    ends.outbox.flush()
    assert ends.texts(1) == ["afterwards"]


def test_many_threads_write_whole_frames_in_their_own_order(ends: Ends) -> None:
    ends.start()

    def tell(name: str) -> None:
        for number in range(300):
            ends.outbox.deliver(name, TextPiece(text=f"{name}{number}"))
            ends.outbox.flush()
            ends.outbox.send(wire.Pong(at=float(number), load=LOAD))

    threads = [threading.Thread(target=tell, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    texts: list[str] = []
    pongs = 0
    while len(texts) < 1200 or pongs < 1200:
        message = ends.read()
        if isinstance(message, wire.Pong):
            pongs += 1
        else:
            assert isinstance(message, wire.Report)
            texts += [event.text for _, event in message.events if isinstance(event, TextPiece)]
    for thread in threads:
        thread.join()
    for name in "abcd":
        assert [text for text in texts if text[0] == name] == [f"{name}{number}" for number in range(300)]


def test_a_server_that_is_gone_is_no_matter(ends: Ends) -> None:
    ends.start()
    ends.theirs.close()
    for _ in range(3):
        ends.outbox.deliver("a", TextPiece(text="lost"))
        ends.outbox.flush()


def test_figures_wait_for_what_a_person_waits_for(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step without text to send costs no frame of its own; its figures come with the next text."""
    monkeypatch.setattr(outbox, "SAID_SECONDS", 60.0)
    ends.start()
    ends.outbox.deliver("a", TextPiece(text="one"))
    ends.outbox.flush()
    assert ends.texts(1) == ["one"]
    ends.outbox.record_step(StepStats(seconds=0.1, prompt_tokens=0, generated_tokens=1))
    ends.outbox.flush()
    ends.outbox.deliver("a", TextPiece(text="two"))
    ends.outbox.flush()
    message = ends.read()
    assert isinstance(message, wire.Report)
    assert (len(message.steps), [event.text for _, event in message.events if isinstance(event, TextPiece)]) == (1, ["two"])
