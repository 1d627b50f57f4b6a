"""Random requests, cancelled at random: each ends once, says what it would say alone, and leaves nothing behind."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import QueueFull
from appliance.serving.cache import common_length
from appliance.serving.events import Failed, Finished
from tests.serving.counting_decoder import END, CountingDecoder
from tests.serving.scheduler_bench import Bench, Client

CONTEXT_TOKENS = 96
OPERATORS = tuple(range(500, 540))


def follow(history: tuple[int, ...]) -> int:
    """Repeats itself now and then, so that some guesses are right, and depends on all that was before."""
    if len(history) % 16 < 11:
        return history[len(history) % 7 % len(history)]
    value = sum(history) * 31 % 50
    return END if value == 7 else value + 1


@dataclasses.dataclass(frozen=True)
class Ask:
    prompt: tuple[int, ...]
    max_tokens: int
    n: int
    tenant: str
    adapter: str | None
    is_cancelled: bool

    def answer(self) -> tuple[int, ...]:
        """What the model says when nobody cancels, the end included."""
        said: list[int] = []
        while len(said) < min(self.max_tokens, CONTEXT_TOKENS - len(self.prompt)) and END not in said:
            said.append(follow((*self.prompt, *said)))
        return tuple(said)


beginnings = st.sampled_from([(), OPERATORS, OPERATORS[:20], tuple(range(600, 670)), tuple(range(600, 640))])
asks = st.builds(
    Ask,
    prompt=st.tuples(beginnings, st.lists(st.integers(1, 3), min_size=1, max_size=8).map(tuple)).map(
        lambda two: two[0] + two[1]
    ),
    max_tokens=st.integers(1, 60),
    n=st.sampled_from([1, 1, 1, 3]),
    tenant=st.sampled_from(["a", "b"]),
    adapter=st.sampled_from([None, None, "x"]),
    is_cancelled=st.booleans() | st.just(False),
)


@settings(max_examples=60, deadline=None)
@given(
    slots=st.integers(1, 4),
    can_share=st.booleans() | st.just(True),
    cache_tokens=st.sampled_from([0, 30, 100, 1000]),
    is_speculating=st.booleans(),
    is_warmed=st.booleans(),
    script=st.lists(asks, min_size=1, max_size=12),
)
def test_random_requests(
    slots: int, can_share: bool, cache_tokens: int, is_speculating: bool, is_warmed: bool, script: list[Ask]
) -> None:
    decoder = CountingDecoder(slots=slots, context_tokens=CONTEXT_TOKENS, can_share=can_share, follow=follow)
    with Bench(decoder, queue_requests=8, is_speculating=is_speculating, cache_tokens=cache_tokens) as bench:
        if is_warmed:
            bench.scheduler.warm(OPERATORS)
        clients: list[tuple[Ask, Client]] = []
        for ask in script:
            fields = {"max_tokens": ask.max_tokens, "n": ask.n, "tenant": ask.tenant, "adapter": ask.adapter}
            try:
                client = bench.client(*ask.prompt, **fields)
            except QueueFull:
                continue
            clients.append((ask, client))
            if ask.is_cancelled:
                client.cancel()
        for at, (ask, client) in enumerate(clients):
            _check_answers(ask, client)
            _check_cached(ask, client, [each for each, _ in clients[:at] + clients[at + 1 :]], is_warmed)
        bench.idle()
        assert len(bench.listener.requests) == len(clients)
        assert decoder.samplers == {}
        load = bench.scheduler.load()
        assert load.kv_cells_running == 0
        assert load.kv_cells_used == decoder.used_cells <= load.kv_cells
        assert can_share or load.kv_cells_used == load.cached_tokens == 0
        assert load.cached_tokens <= cache_tokens


_ends: dict[str, list[Finished]] = {}


def _check_answers(ask: Ask, client: Client) -> None:
    ends = [end for end in client.ends() if isinstance(end, Finished)]
    _ends[client.id] = ends
    assert [end.index for end in ends] == list(range(ask.n))
    assert client.events.empty()
    said = ask.answer()
    whole = "".join(f"{token} " for token in said if token != END)
    for end in ends:
        text = client.texts.get(end.index, "")
        if end.reason == "cancelled":
            assert ask.is_cancelled
            assert whole.startswith(text)
        else:
            assert (text, end.generated_tokens) == (whole, len(said))
            assert end.reason == ("stop" if said[-1] == END else "length")


def _check_cached(ask: Ask, client: Client, others: list[Ask], is_warmed: bool) -> None:
    """Only the same tenant's text with the same adapter, or the operator's, can have been found."""
    known = [ask.prompt if ask.n > 1 else ()]
    known += [OPERATORS] if is_warmed and ask.adapter is None else []
    same = [other for other in others if (other.tenant, other.adapter) == (ask.tenant, ask.adapter)]
    known += [other.prompt + other.answer() for other in same]
    limit = max((common_length(each, ask.prompt) for each in known), default=0)
    for end in _ends.pop(client.id):
        assert end.cached_tokens <= min(limit, len(ask.prompt) - 1)


@settings(max_examples=15, deadline=None)
@given(script=st.lists(asks, min_size=1, max_size=6), at=st.integers(0, 8))
def test_closing_ends_everything_at_any_moment(script: list[Ask], at: int) -> None:
    decoder = CountingDecoder(context_tokens=CONTEXT_TOKENS, follow=follow)
    decoder.hold_at = at
    with Bench(decoder, queue_requests=100) as bench:
        clients = [bench.client(*ask.prompt, max_tokens=ask.max_tokens, n=ask.n) for ask in script]
    for ask, client in zip(script, clients, strict=True):
        ends = client.ends()
        assert isinstance(ends[-1], Failed) or len(ends) == ask.n
        assert client.events.empty()
