"""Every request ends exactly once, slots come back, and nobody waits behind a long prompt."""

import itertools
from collections.abc import Iterator

import pytest

from appliance.errors import (
    EngineFailed,
    PromptTooLong,
    QueueFull,
    RequestError,
)
from appliance.serving.decoder import IDLE_CHUNK_TOKENS
from appliance.serving.events import Finished, TextPiece, TokenLogprob
from tests.serving.counting_decoder import CELL_BYTES, CountingDecoder, Forcing
from tests.serving.scheduler_bench import WAIT_SECONDS, Bench, numbers, until


@pytest.fixture
def bench() -> Iterator[Bench]:
    with Bench() as bench:
        yield bench


def test_answer_counts_and_reasons(bench: Bench) -> None:
    cut, ended, stopped = bench.client(1, 2, 3), bench.client(97, max_tokens=50), bench.client(5, stop=("7 8",))
    end = cut.finished()
    assert (end.reason, end.prompt_tokens, end.generated_tokens, cut.text) == ("length", 3, 5, "4 5 6 7 8 ")
    end = ended.finished()
    assert (end.reason, end.prompt_tokens, end.generated_tokens, ended.text) == ("stop", 1, 3, "98 99 ")
    end = stopped.finished()
    assert (end.reason, end.generated_tokens, end.stop, stopped.text) == ("stop", 3, "7 8", "6 ")
    bench.idle()
    assert [stats.outcome for stats in bench.listener.requests].count("stop") == 2
    assert bench.flushes > 0


def test_end_of_the_model_may_be_ignored(bench: Bench) -> None:
    client = bench.client(98, max_tokens=4, ignore_end=True)
    assert client.reason() == "length"
    assert client.text == "99 0 1 2 "


def test_answer_ends_with_the_context(bench: Bench) -> None:
    end = bench.client(*range(1, 61), max_tokens=1000).finished()
    assert (end.reason, end.generated_tokens) == ("length", 4)


@pytest.mark.parametrize("length", [0, 64, 65])
def test_prompt_that_leaves_no_room_is_refused(bench: Bench, length: int) -> None:
    with pytest.raises(PromptTooLong, match=str(length)):
        bench.client(*range(length))


def test_log_probabilities_come_with_their_text(bench: Bench) -> None:
    client = bench.client(1, max_tokens=2, top_logprobs=1)
    client.end()
    first = TokenLogprob(piece=b"2 ", logprob=-0.5, top=((b"2 ", -0.5),))
    assert client.pieces[0] == TextPiece(text="2 ", logprobs=(first,))


def test_text_held_back_is_not_lost(bench: Bench) -> None:
    client = bench.client(1, max_tokens=2, stop=("3 4",))
    assert client.reason() == "length"
    assert client.text == "2 3 "


def test_full_queue_is_refused_with_an_estimate(bench: Bench) -> None:
    bench.decoder.gate.clear()
    clients = [bench.client(i, max_tokens=2) for i in range(1, 7)]
    with pytest.raises(QueueFull, match="and 4 waiting") as refused:
        bench.client(9)
    assert 1 <= refused.value.retry_after_seconds <= 600
    bench.decoder.gate.set()
    assert all(isinstance(client.end(), Finished) for client in clients)


def test_queue_is_bounded_by_tokens_too() -> None:
    with Bench(queue_tokens=40) as bench:
        bench.decoder.gate.clear()
        running = [bench.client(i, max_tokens=2) for i in (1, 2)]
        until(lambda: bench.scheduler.load().waiting == 0)
        waiting = bench.client(*range(50), max_tokens=2)  # may be of any size: it waits alone
        with pytest.raises(QueueFull, match="Prompts of 50 tokens wait and this one has 1; the limit is 40"):
            bench.client(1)
        assert bench.scheduler.load().waiting_tokens == 50
        bench.decoder.gate.set()
        assert [client.reason() for client in (*running, waiting)] == ["length"] * 3


def test_request_whose_first_answer_runs_does_not_wait(bench: Bench) -> None:
    bench.decoder.gate.clear()
    client = bench.client(1, 2, n=4)
    until(lambda: bench.scheduler.load().running > 0)
    assert bench.scheduler.load().waiting == bench.scheduler.load().waiting_tokens == 0
    bench.decoder.gate.set()
    assert len(client.ends()) == 4


def test_same_id_twice_is_refused(bench: Bench) -> None:
    bench.decoder.gate.clear()
    client = bench.client(1)
    with pytest.raises(RequestError, match="is being answered"):
        bench.scheduler.submit(bench.scheduler._tickets[client.id].request, (1,), 0, None, client.events.put)
    bench.decoder.gate.set()
    assert client.reason() == "length"


def test_cancelled_in_the_queue_gives_its_place_to_another(bench: Bench) -> None:
    bench.decoder.gate.clear()
    running = [bench.client(1), bench.client(2)]
    until(lambda: bench.scheduler.load().waiting == 0)
    waiting = [bench.client(3) for _ in range(4)]
    waiting[0].cancel()
    end = waiting[0].finished()
    assert (end.reason, end.generated_tokens) == ("cancelled", 0)
    late = bench.client(4)
    bench.decoder.gate.set()
    for client in (*running, *waiting[1:], late):
        assert client.reason() == "length"
    assert bench.listener.requests[0].cancelled_in == "queue"
    assert bench.listener.requests[0].prefill_seconds is None


def test_cancelled_while_running_frees_the_slot(bench: Bench) -> None:
    bench.decoder.hold_at = 1
    gone = bench.client(1, max_tokens=60)
    assert isinstance(gone.next(), TextPiece)
    gone.cancel()
    assert gone.reason() == "cancelled"
    bench.idle()
    assert bench.decoder.samplers == {}
    assert bench.listener.requests[0].cancelled_in == "decode"
    bench.scheduler.cancel("of nobody")


def test_cancelled_prefill_is_aborted_when_it_is_alone(bench: Bench) -> None:
    bench.decoder.gate.clear()
    gone = bench.client(1, 2)
    assert bench.decoder.entered.acquire(timeout=WAIT_SECONDS)
    gone.cancel()  # the fake's abort opens the gate
    assert gone.reason() == "cancelled"
    bench.idle()
    assert bench.listener.requests[0].cancelled_in == "prefill"
    again = bench.client(1, 2)  # what the aborted call left behind is not used
    assert again.finished().cached_tokens == 0
    assert again.text == "3 4 5 6 7 "


def test_others_keep_running_when_one_is_cancelled(bench: Bench) -> None:
    bench.decoder.gate.clear()
    gone = bench.client(1, max_tokens=60)
    assert bench.decoder.entered.acquire(timeout=WAIT_SECONDS)
    stays = bench.client(2)
    bench.decoder.hold_at = 1
    bench.decoder.gate.set()
    until(lambda: not bench.decoder.gate.is_set())
    gone.cancel()
    gone.cancel()
    assert bench.decoder.aborts == 0
    bench.decoder.gate.set()
    assert stays.reason() == "length"
    assert stays.text == "3 4 5 6 7 "
    assert gone.reason() == "cancelled"


def test_those_not_cancelled_go_on_after_an_aborted_call(bench: Bench) -> None:
    bench.decoder.gate.clear()
    client = bench.client(*range(1, 11))
    assert bench.decoder.entered.acquire(timeout=WAIT_SECONDS)
    bench.decoder.abort()
    assert client.reason() == "length"
    assert client.text == numbers(11, 5)


@pytest.mark.parametrize("error", [EngineFailed("no memory"), ZeroDivisionError()])
def test_failed_decode_fails_those_in_flight_and_no_others(bench: Bench, error: Exception) -> None:
    assert bench.client(1, 2, 3).reason() == "length"
    bench.idle()
    bench.decoder.gate.clear()
    first = bench.client(1, 2, 3, n=3)
    until(lambda: bench.scheduler.load().running == 2)
    waiting = bench.client(2)
    bench.decoder.failures.append(error)
    bench.decoder.gate.set()
    assert first.failed().code == "engine_failed"
    assert first.events.empty()
    assert waiting.reason() == "length"
    again = bench.client(1, 2, 3)
    assert again.finished().cached_tokens == 0  # nothing is trusted that was there before
    bench.idle()
    assert [stats.outcome for stats in bench.listener.requests] == ["length", "failed", "length", "length"]
    assert bench.listener.requests[1].failure_code == "engine_failed"


@pytest.mark.parametrize("error", [RequestError("The grammar has no beginning."), ZeroDivisionError()])
def test_sampler_that_cannot_be_made_fails_its_request_alone(bench: Bench, error: Exception) -> None:
    bench.decoder.start_failures.append(error)
    bad = bench.client(1, n=2)
    good = bench.client(2)
    assert bad.failed().message == str(error) or isinstance(error, ZeroDivisionError)
    assert good.reason() == "length"
    assert [stats.outcome for stats in bench.listener.requests] == ["failed", "length"]


def test_slot_is_not_lost_with_cells_that_cannot_be_had() -> None:
    with Bench(CountingDecoder(slots=1, context_tokens=80)) as bench:
        assert bench.client(*range(1, 41)).reason() == "length"  # what it leaves has to make room for the next
        bench.idle()
        bench.decoder.remove_failures.append(EngineFailed("no part of it can be forgotten"))
        assert bench.client(*range(100, 160)).failed().code == "engine_failed"
        assert bench.client(1, 2, 3).reason() == "length"


def test_grammar_that_cannot_go_on_fails_its_request_alone(bench: Bench) -> None:
    bench.decoder.gate.clear()
    bad = bench.client(1, n=2)
    bench.decoder.sample_failures.append("The grammar leaves no token.")
    bench.decoder.gate.set()
    failed = bad.failed()
    assert (failed.code, failed.message) == ("invalid_request", "The grammar leaves no token.")
    assert bench.client(2).reason() == "length"
    assert bad.events.empty()


def test_long_prompt_does_not_stop_running_answers() -> None:
    with Bench(CountingDecoder(context_tokens=1000)) as bench:
        bench.decoder.gate.clear()
        answer = bench.client(1, max_tokens=90)
        assert bench.decoder.entered.acquire(timeout=WAIT_SECONDS)
        long = bench.client(*([1] * 900), max_tokens=1)
        bench.decoder.gate.set()
        assert long.reason() == answer.reason() == "length"
        beside = [batch for batch in bench.decoder.batches if len(batch) == 2]
        assert len(beside) >= 2
        assert all(batch[0] == 1 and batch[1] <= IDLE_CHUNK_TOKENS for batch in beside)


def test_short_prompt_overtakes_a_long_one_that_came_first() -> None:
    with Bench(CountingDecoder(context_tokens=2000)) as bench:
        bench.decoder.gate.clear()
        long = bench.client(*([1] * 1900), max_tokens=1)
        short = bench.client(*([2] * 60), max_tokens=1)
        bench.decoder.gate.set()
        assert long.reason() == short.reason() == "length"
        assert [len(batch) for batch in bench.decoder.batches].index(2) <= 1
        assert bench.listener.requests[0].prompt_tokens == 60
        assert next(batch for batch in bench.decoder.batches if len(batch) == 2) == [60, 256 - 60]


def test_two_documents_are_read_in_turns_and_not_in_halves() -> None:
    """Each part costs a pass over the weights, whatever its length."""
    with Bench(CountingDecoder(context_tokens=2000)) as bench:
        bench.decoder.gate.clear()
        clients = [bench.client(*([1] * 1500), max_tokens=1), bench.client(*([2] * 1000), max_tokens=1)]
        bench.decoder.gate.set()
        assert [client.reason() for client in clients] == ["length"] * 2
        both = bench.decoder.feeds[1:7]  # the second came during the first step
        assert [[len(feed.tokens) for feed in feeds] for feeds in both] == [[256]] * 6
        assert all(one[0].slot != other[0].slot for one, other in itertools.pairwise(both))


def test_tokens_that_a_grammar_decides_are_not_sampled_one_by_one() -> None:
    with Bench() as bench:
        client = bench.client(1, grammar=Forcing(2, (40, 41, 42)), max_tokens=6)
        assert client.finished().generated_tokens == 6
        assert client.text == "2 40 41 42 43 44 "
        assert bench.decoder.batches == [[1], [4], [1]]
        assert sum(stats.forced_tokens for stats in bench.listener.steps) == 3
        assert sum(stats.generated_tokens for stats in bench.listener.steps) == 6
        cut = bench.client(1, grammar=Forcing(2, tuple(range(10, 60))), max_tokens=3)
        assert cut.finished().generated_tokens == 3
        assert cut.text == "2 10 11 "
        many = bench.client(1, 1, grammar=Forcing(2, tuple(range(10, 60))), max_tokens=52)
        assert many.reason() == "length"
        assert many.text == "2 " + numbers(10, 51)


def test_what_a_grammar_decides_never_overfills_a_batch() -> None:
    with Bench(CountingDecoder(context_tokens=1000)) as bench:
        bench.decoder.gate.clear()
        clients = [bench.client(first, grammar=Forcing(first + 1, (5,) * 400), max_tokens=403) for first in (1, 2)]
        bench.decoder.gate.set()
        assert [client.reason() for client in clients] == ["length"] * 2
        assert [client.text for client in clients] == [f"{first + 1} {'5 ' * 400}6 7 " for first in (1, 2)]
        assert max(sum(batch) for batch in bench.decoder.batches) > 256


def test_steps_and_requests_are_told(bench: Bench) -> None:
    with Bench(weight_bytes=1000) as bench:
        client = bench.client(1, 2, 3, max_tokens=2)
        end = client.finished()
        assert end.queue_seconds >= 0
        assert end.prefill_seconds > 0
        assert end.decode_seconds > 0
        bench.idle()
        prefill, decode = bench.listener.steps
        assert (prefill.prompt_tokens, prefill.generated_tokens, len(prefill.first_token_seconds)) == (3, 1, 1)
        assert (decode.prompt_tokens, decode.generated_tokens, len(decode.inter_token_seconds)) == (0, 1, 1)
        assert prefill.read_bytes == 1000 + 3 * CELL_BYTES
        assert decode.read_bytes == 1000 + 4 * CELL_BYTES
        (stats,) = bench.listener.requests
        assert (stats.outcome, stats.prompt_tokens, stats.generated_tokens, stats.max_tokens) == ("length", 3, 2, 2)
        assert (stats.n, stats.cached_tokens, stats.cancelled_in, stats.missed_deadline_in) == (1, 0, None, None)
        load = bench.scheduler.load()
        assert (load.kv_cells_used, load.kv_cells_running, load.kv_cells) == (4, 0, 128)
        assert load.step_started_at is None


def test_step_in_flight_is_told() -> None:
    with Bench() as bench:
        bench.decoder.gate.clear()
        client = bench.client(1)
        assert bench.decoder.entered.acquire(timeout=WAIT_SECONDS)
        assert bench.scheduler.load().step_started_at is not None
        bench.decoder.gate.set()
        client.end()


def test_a_prompt_is_read_in_equal_parts() -> None:
    with Bench(CountingDecoder(context_tokens=1000)) as bench:
        assert bench.client(*range(2000, 2100), max_tokens=1).reason() == "length", "so that its pace is known"
        assert bench.client(*range(1000, 1520), max_tokens=2).reason() == "length"
    assert bench.decoder.batches[-4:] == [[174], [173], [173], [1]]
