"""What answers share: prefixes, the KV memory, adapters' turns, idle time; and what tenants never share."""

import itertools

import pytest

from appliance.errors import EngineFailed
from appliance.serving.decoder import Adapter
from appliance.serving.events import Finished
from appliance.serving.snapshots import Prefix
from tests.serving.counting_decoder import CountingDecoder
from tests.serving.scheduler_bench import Bench, bench_of, cached, numbers, until

SYSTEM = tuple(range(100, 140))


@pytest.fixture(autouse=True)
def no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle work begins at once."""
    monkeypatch.setattr("appliance.serving.scheduler.SETTLE_SECONDS", 0.0)


def test_next_turn_of_a_conversation_computes_only_what_is_new() -> None:
    with bench_of() as bench:
        first = bench.client(1, 2, 3, max_tokens=5)
        assert cached(first) == 0
        bench.idle()
        second = bench.client(1, 2, 3, 4, 5, 6, 7, 8, 50)
        assert cached(second) == 7  # the last token of an answer has never been computed
        assert second.text == numbers(51, 5)
        bench.idle()
        assert sum(stats.prompt_tokens for stats in bench.listener.steps) == 3 + 2
        assert bench.listener.requests[1].cached_tokens == 7


def test_same_prompt_again_computes_its_last_token() -> None:
    with bench_of() as bench:
        clients = [bench.client(*SYSTEM, 7) for _ in range(1)]
        assert cached(clients[0]) == 0
        again = bench.client(*SYSTEM, 7)
        assert cached(again) == len(SYSTEM)
        assert again.text == clients[0].text == numbers(8, 5)


def test_prompt_with_the_same_beginning_is_read_once() -> None:
    with bench_of() as bench:
        bench.decoder.gate.clear()
        long = tuple(range(100, 180))
        clients = [bench.client(*long, last) for last in (1, 2)]
        bench.decoder.gate.set()
        assert [cached(client) for client in clients] == [0, 80]
        assert [client.text for client in clients] == [numbers(2, 5), numbers(3, 5)]


def test_one_that_waits_for_a_prefix_is_overtaken_and_outlives_the_reader() -> None:
    with bench_of(slots=3) as bench:
        bench.decoder.gate.clear()
        long = tuple(range(100, 180))
        with bench.together():
            reader, waiter, other = bench.client(*long, 1), bench.client(*long, 2), bench.client(9)
        until(lambda: bench.scheduler.load().running == 2)
        reader.cancel()
        bench.decoder.gate.set()
        assert reader.reason() == "cancelled"
        assert waiter.reason() == other.reason() == "length"
        assert (waiter.text, other.text) == (numbers(3, 5), numbers(10, 5))


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_answers_to_one_prompt_read_it_once(slots: int) -> None:
    with bench_of(slots=slots) as bench:
        client = bench.client(1, 2, 3, n=4, seed=7)
        ends = client.ends()
        assert [end.cached_tokens for end in ends if isinstance(end, Finished)] == [0, 2, 2, 2]
        assert client.texts == dict.fromkeys(range(4), numbers(4, 5))
        assert [sampler.sampling.seed for sampler in bench.decoder.started] == [7, 8, 9, 10]
        bench.idle()
        (stats,) = bench.listener.requests
        assert (stats.n, stats.prompt_tokens, stats.cached_tokens, stats.generated_tokens) == (4, 3, 0, 20)
        assert sum(len(stats.first_token_seconds) for stats in bench.listener.steps) == 1


def test_models_that_cannot_share_answer_all_the_same() -> None:
    decoder = CountingDecoder(slots=2, can_share=False)
    with Bench(decoder) as bench:
        client = bench.client(*range(1, 21), n=3)
        assert len(client.ends()) == 3
        assert client.texts == dict.fromkeys(range(3), numbers(21, 5))
        bench.scheduler.warm([1, 2, 3])
        decoder.gate.clear()
        gone = bench.client(1)
        until(lambda: bench.scheduler.load().running == 1)
        gone.cancel()
        assert gone.reason() == "cancelled"
        assert cached(bench.client(*range(1, 21))) == 0


def test_tenants_do_not_find_each_others_prompts() -> None:
    with bench_of() as bench:
        assert cached(bench.client(*SYSTEM, 1, tenant="a")) == 0
        assert cached(bench.client(*SYSTEM, 1, tenant="b")) == 0
        assert cached(bench.client(*SYSTEM, 1, tenant="a")) == len(SYSTEM)


def test_operators_prefix_is_read_before_anyone_asks_and_is_for_all() -> None:
    with bench_of() as bench:
        bench.scheduler.warm(SYSTEM)
        until(lambda: bench.decoder.computed == len(SYSTEM))
        until(lambda: bench.scheduler.load().kv_cells_running == 0)
        assert cached(bench.client(*SYSTEM, 1, 2, 3, tenant="a")) == len(SYSTEM)
        assert cached(bench.client(*SYSTEM, 1, 2, 3, tenant="b")) == len(SYSTEM)
        assert cached(bench.client(*SYSTEM, 1, 2, 3, adapter="x")) == 0


def test_operators_prefix_that_a_visitor_read_first_is_for_all_too() -> None:
    with bench_of() as bench:
        bench.decoder.gate.clear()
        first = bench.client(*SYSTEM, 1, 2, 3, tenant="a")
        bench.scheduler.warm(SYSTEM)
        bench.decoder.gate.set()
        assert cached(first) == 0
        assert cached(bench.client(*SYSTEM, 1, 2, 3, tenant="b")) == len(SYSTEM)
        bench.idle()
        assert bench.decoder.computed == len(SYSTEM) + 2 * (3 + 4)


def test_what_another_has_behind_the_operators_text_stays_its_own() -> None:
    with bench_of() as bench:
        bench.scheduler.warm(SYSTEM)
        bench.idle()
        secret = (*SYSTEM, 8, 8, 8, 8)
        for other in ("b", "c"):  # it is in a slot first, and in the cache then
            assert cached(bench.client(*secret, 1, tenant="a")) >= len(SYSTEM)
            assert cached(bench.client(*secret, 1, tenant=other)) == len(SYSTEM)
            for _ in range(2):
                bench.client(9, tenant="d").end()


def test_reading_ahead_gives_way_to_requests() -> None:
    with bench_of(slots=1) as bench:
        bench.scheduler._pace._prompt_token_seconds = 0.02  # chunks of 16
        bench.decoder.hold_at = 1
        bench.scheduler.warm(SYSTEM)
        until(lambda: len(bench.decoder.batches) == 1 and not bench.decoder.gate.is_set())
        client = bench.client(*SYSTEM, 1)
        bench.decoder.gate.set()
        assert cached(client) > 0
        until(lambda: bench.scheduler._prefixes.has(Prefix(SYSTEM)))


def test_prefix_that_fails_while_read_ahead_is_not_tried_for_ever() -> None:
    with bench_of() as bench:
        bench.decoder.failures.append(EngineFailed("no memory"))
        bench.scheduler.warm(SYSTEM)
        until(lambda: not bench.decoder.failures)
        assert cached(bench.client(*SYSTEM, 1)) == 0
        bench.idle()
        assert bench.decoder.computed == len(SYSTEM) + 1 + 4


def test_prefix_whose_reading_cannot_begin_is_not_tried_for_ever() -> None:
    with bench_of() as bench:
        bench.decoder.start_failures += [EngineFailed("no memory")] * 3
        bench.scheduler.warm(SYSTEM)
        bench.idle()
        assert len(bench.decoder.start_failures) == 2


def test_cached_prefixes_make_room_oldest_first() -> None:
    with bench_of(slots=1, cache_tokens=125) as bench:
        for first in (1, 50, 100):
            bench.client(*range(first, first + 40), max_tokens=1).end()
        assert cached(bench.client(*range(1, 41), 99, max_tokens=1)) == 40  # used again: now the youngest
        assert bench.client(*range(1000, 1060), max_tokens=1).reason() == "length"
        assert cached(bench.client(7, max_tokens=1)) == 0
        assert cached(bench.client(*range(1, 41), 99, max_tokens=1)) == 40
        assert cached(bench.client(*range(50, 90), 99, max_tokens=1)) == 0


@pytest.mark.parametrize("cache_tokens", [0, 1000])
def test_slot_is_copied_for_another_answer_whatever_the_cache_holds(cache_tokens: int) -> None:
    with bench_of(slots=3, cache_tokens=cache_tokens) as bench:
        bench.decoder.gate.clear()
        long = tuple(range(100, 180))
        clients = [bench.client(*long, last) for last in (1, 2, 3)]
        bench.decoder.gate.set()
        assert [cached(client) for client in clients] == [0, 80, 80]


def test_next_turn_is_answered_in_the_slot_of_the_last_without_a_copy() -> None:
    with bench_of(slots=2, cache_tokens=0) as bench:
        bench.client(*SYSTEM, max_tokens=2).end()
        bench.idle()
        assert cached(bench.client(*SYSTEM, 140, 9)) == len(SYSTEM) + 1
        assert bench.decoder.copied == 0


def test_answers_move_together_when_one_between_them_ends() -> None:
    """llama.cpp reads the weights once for neighbouring slots; the decoder refuses a batch with gaps."""
    decoder = CountingDecoder(slots=5, context_tokens=200, follow=lambda history: history[-1])
    with Bench(decoder, queue_requests=5, cache_tokens=1000) as bench:
        decoder.gate.clear()
        limits = (30, 5, 60, 10, 90)
        clients = [bench.client(first, max_tokens=limit) for first, limit in enumerate(limits, start=1)]
        decoder.gate.set()
        assert [client.finished().generated_tokens for client in clients] == list(limits)
        assert [client.text for client in clients] == [f"{first} " * limit for first, limit in enumerate(limits, start=1)]
        assert decoder.moves > 0


def test_answer_that_was_not_read_yet_moves_when_one_before_it_ends() -> None:
    decoder = CountingDecoder(slots=3, context_tokens=600, follow=lambda history: history[-1])
    with Bench(decoder, cache_tokens=1000) as bench:
        decoder.gate.clear()
        lengths = ((20, 1, 40), (240, 2, 1), (250, 3, 3))  # tokens, the last of them, tokens of the answer
        with bench.together():
            clients = [bench.client(*([10 * last] * count), last, max_tokens=limit) for count, last, limit in lengths]
        decoder.hold_at = 1
        decoder.gate.set()
        until(lambda: bench.scheduler.load().running == 3)
        clients[1].cancel()
        decoder.gate.set()
        assert [client.reason() for client in clients] == ["length", "cancelled", "length"]
        assert clients[2].text == "3 " * 3
        assert decoder.moves == 1


def test_answers_of_a_model_that_cannot_share_stay_where_they_are() -> None:
    decoder = CountingDecoder(slots=3, context_tokens=200, can_share=False, follow=lambda history: history[-1])
    with Bench(decoder) as bench:
        decoder.gate.clear()
        clients = [bench.client(first, max_tokens=limit) for first, limit in ((1, 20), (2, 3), (3, 30))]
        decoder.gate.set()
        assert [client.finished().generated_tokens for client in clients] == [20, 3, 30]
        assert decoder.moves == decoder.copied == 0


def test_adapters_take_turns_and_are_never_mixed() -> None:
    with bench_of(slots=3) as bench:
        bench.decoder.gate.clear()
        with bench.together():
            clients = [bench.client(1, 2, 3, adapter=name, max_tokens=20) for name in (None, "x", "y")]
        until(lambda: bench.scheduler.load().running == 3)
        bench.decoder.gate.set()
        assert [client.reason() for client in clients] == ["length"] * 3
        turns = bench.decoder.adapters
        assert all(a != b for a, b in itertools.pairwise(turns[1:]))
        assert set(turns) == {None, Adapter("x", 1.0), Adapter("y", 1.0)}
        bench.idle()
        assert cached(bench.client(1, 2, 3, adapter="x", adapter_scale=0.5)) == 0
        assert cached(bench.client(1, 2, 3, adapter="x")) == 2


def test_guesses_are_made_while_they_pay_and_change_nothing() -> None:
    def follow(history: tuple[int, ...]) -> int:
        return history[len(history) % 10]

    prompt = tuple(range(10, 20))
    texts = []
    for is_speculating in (False, True):
        decoder = CountingDecoder(context_tokens=400, follow=follow)
        with Bench(decoder, is_speculating=is_speculating) as bench:
            client = bench.client(*prompt, max_tokens=100)
            assert client.finished().generated_tokens == 100
            texts.append(client.text)
            drafted = sum(stats.drafted_tokens for stats in bench.listener.steps)
            accepted = sum(stats.accepted_tokens for stats in bench.listener.steps)
            assert (drafted > 0) == is_speculating
            assert accepted <= drafted
            if is_speculating:
                assert accepted > 50
                assert bench.decoder.computed < 10 + 99 + drafted
    assert texts[0] == texts[1]


def test_nothing_is_copied_while_the_next_request_may_come_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.serving.scheduler.SETTLE_SECONDS", 0.1)
    with bench_of(cache_tokens=400, slots=1) as bench:
        bench.client(*SYSTEM, 1).end()
        bench.idle()
        assert bench.scheduler.load().cached_tokens == 0
        until(lambda: bench.scheduler.load().cached_tokens == len(SYSTEM) + 1 + 4)
        assert cached(bench.client(*range(500, 540))) == 0
        assert cached(bench.client(*SYSTEM, 1)) == len(SYSTEM)
        bench.idle()
        assert bench.decoder.computed == (len(SYSTEM) + 1 + 4) + (40 + 4) + (1 + 4)
