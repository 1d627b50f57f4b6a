"""One answer's state, by hand."""

from appliance.serving.decoder import Sampled
from appliance.serving.events import Event, TextPiece
from appliance.serving.job import Answer, Job, Ticket
from appliance.serving.requests import GenerationRequest, TokenPrompt
from appliance.serving.text_stream import TextStream
from tests.serving.counting_decoder import END, CountingDecoder


def answer_to(prompt: list[int], events: list[Event], **fields: int) -> Answer:
    request = GenerationRequest(id="r", prompt=TokenPrompt(tokens=()), arrived_at=1.0, max_tokens=10)
    ticket = Ticket(request, tuple(prompt), 0, None, events.append, fields.get("max_tokens", 10))
    ticket.answers = [Answer(ticket, 0, Job(list(prompt), len(prompt), 20, None, ""), TextStream())]
    return ticket.answers[0]


def test_what_was_guessed_right_behind_the_end_does_not_count() -> None:
    events: list[Event] = []
    answer = answer_to([1, 2, 3], events)
    answer.job.computed = 6
    assert answer.take([Sampled(5), Sampled(END), Sampled(7), Sampled(8)], CountingDecoder(), 2.0) == 2
    assert (answer.reason, answer.generated, answer.known_tokens) == ("stop", 2, 5)
    assert events == [TextPiece(text="5 ")]


def test_tokens_of_one_step_are_one_piece() -> None:
    events: list[Event] = []
    answer = answer_to([1], events, max_tokens=3)
    assert answer.take(map(Sampled, [5, 6, 7, 8]), CountingDecoder(), 2.0) == 3
    assert answer.reason == "length"
    assert events == [TextPiece(text="5 6 7 ")]


def test_first_token_stays_the_first() -> None:
    answer = answer_to([1], [])
    for now in (2.0, 3.0):
        answer.take([Sampled(5)], CountingDecoder(), now)
    assert (answer.first_token_at, answer.ticket.first_token_at, answer.last_token_at) == (2.0, 2.0, 3.0)


def test_text_leaves_no_more_often_than_it_may_and_never_stays() -> None:
    """The first token at once; then what came in the meantime together; at the end the rest."""
    events: list[Event] = []
    answer = answer_to([1], events, max_tokens=7)
    answer.interval_seconds = 0.03
    for token, now in ((1, 2.0), (2, 2.02), (3, 2.04), (4, 2.06), (5, 2.2), (6, 2.21), (7, 2.22)):
        answer.take([Sampled(token)], CountingDecoder(), now)
    assert answer.reason == "length"
    assert events == [TextPiece(text=text) for text in ("1 ", "2 3 ", "4 5 ", "6 7 ")]


def test_what_did_not_leave_yet_leaves_with_a_failure() -> None:
    events: list[Event] = []
    answer = answer_to([1], events)
    answer.interval_seconds = 60.0
    for now in (2.0, 3.0):
        answer.take([Sampled(5)], CountingDecoder(), now)
    answer.send()
    answer.send()
    assert events == [TextPiece(text="5 "), TextPiece(text="5 ")]
