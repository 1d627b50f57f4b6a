"""The radix tree: what is found is right, and its book-keeping matches the bytes it holds."""

import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.serving.cache import PrefixCache, Saved, common_length
from appliance.serving.decoder import Adapter, Feed, SavedCells, SavedPart
from appliance.serving.requests import SamplingSettings
from appliance.serving.runs import finder
from tests.serving.counting_decoder import CountingDecoder

LONG = tuple(range(100, 200))


class Asked:
    """Finds 7 and what follows it, and counts how often it is asked."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, tokens: Sequence[int]) -> int | None:
        self.count += 1
        return tokens.index(7) if 7 in tokens else None


class Memory:
    """A cache over a counting decoder, whose slot 0 computes what is inserted and slot 1 takes what is found."""

    def __init__(self, limit: int = 1000, mapped_limit: int = 0) -> None:
        self.decoder = CountingDecoder(slots=2, context_tokens=400)
        self.cache = PrefixCache(self.decoder.join, limit, mapped_limit)

    def saved(self, tokens: tuple[int, ...], adapter: Adapter | None = None) -> SavedPart:
        self.decoder.start(0, SamplingSettings(), None, None)
        self.decoder.decode([Feed(0, tokens, 0, False)], adapter)
        cells = self.decoder.save(0)
        self.decoder.release(0, 0)
        return SavedPart(cells, 0, len(tokens))

    def insert(
        self,
        tokens: tuple[int, ...],
        owner: str | None = "a",
        adapter: Adapter | None = None,
        *,
        longer: tuple[int, ...] = (),
        is_mapped: bool = False,
    ) -> bool:
        """`longer` is what the slot holds behind the tokens."""
        return self.cache.insert(
            adapter, owner, tokens, lambda: self.saved((*tokens, *longer), adapter), is_mapped=is_mapped
        )

    def length(self, tokens: tuple[int, ...], owner: str | None = "a", adapter: Adapter | None = None) -> int:
        return self.cache.match(adapter, owner, tokens).length

    def load(self, tokens: tuple[int, ...], owner: str | None = "a", adapter: Adapter | None = None) -> int:
        """Takes what is known of the tokens and computes the rest on top, which checks every cell."""
        match = self.cache.match(adapter, owner, tokens[:-1])
        self.decoder.start(1, SamplingSettings(), None, None)
        if match.length:
            self.decoder.restore(1, self.cache.parts(match))
        self.decoder.decode([Feed(1, tokens[match.length :], match.length, True)], adapter)
        self.decoder.release(1, 0)
        return match.length

    def bytes_tokens(self) -> int:
        """Tokens in all the bytes that are held in memory."""
        saved: set[Saved] = {each.saved for each in self.cache._nodes if each.saved and not each.saved.is_mapped}
        return sum(len(self.decoder._joined([SavedPart(each.cells, *extent(each.cells))])) for each in saved)


def extent(cells: SavedCells) -> tuple[int, int]:
    start, _, saved = json.loads(bytes(cells))
    return start, start + len(saved)


def test_prefixes_are_stored_once() -> None:
    memory = Memory()
    assert memory.insert(LONG)
    before = memory.decoder.computed
    assert memory.insert(LONG)
    assert memory.decoder.computed == before, "nothing is saved for what is there"
    assert memory.insert((*LONG[:60], 1, 2))
    assert memory.length((*LONG[:60], 1, 2, 3)) == 62
    assert memory.length((*LONG, 5)) == 100
    assert memory.length(LONG[:70]) == 70
    assert memory.cache.tokens == memory.bytes_tokens() == 102
    for text in ((*LONG, 5), (*LONG[:60], 1, 2, 3), (*LONG[:80], 1)):
        assert memory.load(text) == len(text) - 1


def test_continued_conversation_is_one_piece() -> None:
    memory = Memory()
    for end in (20, 50, 100):
        memory.insert(LONG[:end], longer=(1, 2))
    assert len(memory.cache._nodes) == 1
    assert memory.cache.tokens == memory.bytes_tokens() == 100
    assert memory.load((*LONG, 5)) == 100


def test_owners_and_adapters_are_apart_and_the_operators_text_is_for_all() -> None:
    memory = Memory()
    memory.insert(LONG[:40], owner=None)
    memory.insert(LONG[:80], owner="a")
    assert memory.cache.tokens == memory.bytes_tokens() == 80
    assert memory.length(LONG, owner="a") == 80
    assert memory.length(LONG, owner="b") == 40
    assert memory.length(LONG, owner=None) == 40
    assert memory.length(LONG, owner="a", adapter=Adapter("x", 1.0)) == 0
    memory.insert(LONG[:10], owner="a", adapter=Adapter("x", 1.0))
    assert memory.length(LONG, owner="a", adapter=Adapter("x", 0.5)) == 0


def test_longest_of_two_owners_wins() -> None:
    memory = Memory()
    memory.insert(LONG[:80], owner="a")
    memory.insert(LONG[:40], owner=None)
    memory.insert((*LONG[:40], 1, 2), owner=None)
    assert memory.length(LONG, owner="a") == 80
    assert memory.length((*LONG[:40], 1, 2), owner="a") == 42


def test_oldest_end_goes_first_and_beginnings_stay() -> None:
    memory = Memory(limit=56)
    memory.insert((*LONG[:50], 1, 1, 1))
    memory.insert((*LONG[:50], 2, 2, 2))
    memory.load((*LONG[:50], 1, 1, 1, 9))
    memory.insert((7, 7))
    assert memory.length((*LONG[:50], 2, 2, 2)) == 50
    assert memory.length((*LONG[:50], 1, 1, 1)) == 53
    memory.insert((8, 8))
    assert memory.length((*LONG[:50], 1, 1, 1)) == 50
    assert memory.load((*LONG[:50], 3)) == 50
    assert memory.cache.tokens == memory.bytes_tokens() == 54


def test_operators_text_stays_before_any_tenants() -> None:
    memory = Memory(limit=45)
    memory.insert(LONG[:40], owner=None)
    memory.insert((1, 2, 3), owner="a")
    assert not memory.insert((4, 5, 6, 7, 8, 9), owner="a")
    assert memory.insert((4, 5, 6, 7, 8), owner="a")
    assert memory.length(LONG, owner=None) == 40
    assert memory.length((1, 2, 3)) == 0
    assert memory.insert((1, 2, 3), owner=None)
    assert memory.length((4, 5, 6, 7, 8)) == 0


def test_what_finds_no_place_pushes_nothing_out() -> None:
    memory = Memory(limit=50)
    memory.insert(LONG[:40])
    computed = memory.decoder.computed
    assert not memory.insert(tuple(range(500, 560)))
    assert (memory.length(LONG), memory.cache.tokens, memory.decoder.computed) == (40, 40, computed)
    assert not Memory(limit=0).insert((1,))


def test_what_is_continued_does_not_make_room_for_its_end() -> None:
    memory = Memory(limit=100)
    memory.insert(LONG[:90])
    assert memory.insert((*LONG[:60], *range(1, 11)))
    assert memory.load((*LONG[:60], *range(1, 11), 5)) == 70
    assert memory.length(LONG) == 90
    assert memory.insert((*LONG[:60], *range(11, 31)))
    assert memory.length(LONG) == 60
    assert memory.cache.tokens == memory.bytes_tokens() == 90


def test_trees_of_scales_that_clients_choose_do_not_pile_up() -> None:
    memory = Memory(limit=6)
    for scale in range(50):
        memory.insert((1, 2, 3), adapter=Adapter("x", float(scale)))
    assert len(memory.cache._roots) <= 4


def test_cells_in_files_have_a_limit_of_their_own() -> None:
    memory = Memory(limit=0, mapped_limit=100)
    assert memory.insert(LONG[:60], is_mapped=True)
    assert memory.insert((1, 2, 3), is_mapped=True)
    assert not memory.insert((4, 5, 6))
    assert memory.cache.tokens == 0
    assert memory.load(LONG) == 60
    assert memory.insert(tuple(range(500, 550)), is_mapped=True)
    assert (memory.length((1, 2, 3)), memory.length(LONG)) == (0, 0)


def test_cells_from_a_file_continue_those_in_memory_and_are_continued() -> None:
    memory = Memory(limit=100, mapped_limit=100)
    memory.insert(LONG[:30])
    memory.insert(LONG[:60], is_mapped=True)
    memory.insert(LONG[:90])
    memory.insert((*LONG[:45], 1, 2))
    for text in ((*LONG[:90], 5), (*LONG[:45], 1, 2, 3), (*LONG[:50], 9)):
        assert memory.load(text) == len(text) - 1
    assert memory.cache.tokens == memory.bytes_tokens() == 30 + 30 + 2


def test_forgotten_cells_go_with_what_continues_them() -> None:
    memory = Memory()
    memory.insert(LONG[:40], owner=None)
    memory.insert(LONG)
    memory.insert((1, 2, 3))
    memory.cache.forget(memory.cache.match(None, "a", LONG))
    assert (memory.length(LONG), memory.length((1, 2, 3)), memory.cache.tokens) == (0, 3, 3)


def test_parts_outlive_what_is_forgotten() -> None:
    memory = Memory(limit=100)
    memory.insert(LONG[:60])
    memory.insert((*LONG[:30], 1, 2, 3))
    parts = memory.cache.parts(memory.cache.match(None, "a", LONG[:60]))
    memory.cache.forget(memory.cache.match(None, "a", LONG[:60]))
    assert len(memory.decoder._joined(parts)) == 60


tokens = st.lists(st.integers(1, 2), min_size=2, max_size=6).map(
    lambda blocks: tuple(token for block in blocks for token in range(block * 100, block * 100 + 20))
)
owners = st.sampled_from([None, "a", "b"])
actions = st.sampled_from(["insert", "insert", "map", "load", "load", "forget", "clear"])


@settings(max_examples=150, deadline=None)
@given(
    limit=st.sampled_from([0, 30, 100, 1000]),
    mapped_limit=st.sampled_from([0, 100]),
    script=st.lists(st.tuples(actions, tokens, owners, st.integers(1, 60)), max_size=30),
)
def test_random_use(limit: int, mapped_limit: int, script: Sequence[tuple[str, tuple[int, ...], str | None, int]]) -> None:
    memory = Memory(limit, mapped_limit)
    known: list[tuple[tuple[int, ...], str | None]] = []
    for action, text, owner, number in script:
        if action in ("insert", "map") and number < len(text):
            before = memory.length(text, owner)
            is_kept = memory.insert(text[:-number], owner, longer=text[-number:], is_mapped=action == "map")
            assert memory.length(text, owner) >= (len(text) - number if is_kept else before)
            known.append((text, owner))
        elif action == "load":
            length = memory.load(text, owner)
            assert length <= max((common_length(each, text) for each, of in known if of in (None, owner)), default=0)
        elif action == "forget" and (match := memory.cache.match(None, owner, text)).length:
            memory.cache.forget(match)
            assert memory.length(text, owner) == 0 or owner is not None
        elif action == "clear" and number < 10:
            memory.cache.clear()
        assert memory.cache.tokens == memory.bytes_tokens() <= limit
        nodes = memory.cache._nodes
        assert memory.cache._held[True] == sum(len(each.tokens) for each in nodes if each.saved and each.saved.is_mapped)
        assert memory.cache._held[True] <= mapped_limit
    assert memory.decoder.problems == []


@pytest.mark.parametrize(("first", "second", "length"), [((), (1,), 0), ((1, 2, 3), (1, 2, 4), 2), (LONG, LONG, 100)])
def test_common_length(first: tuple[int, ...], second: tuple[int, ...], length: int) -> None:
    assert common_length(first, second) == length


def test_erasing_looks_at_each_end_once_however_much_is_found() -> None:
    memory = Memory()
    for first in range(20, 40):
        memory.insert((first, 1, 2))
        memory.insert((first, 1, 2, 7, first))
        memory.insert((first, 1, 2, 7, 99))
        memory.insert((first, 1, 3))
    asked = Asked()
    assert memory.cache.erase(asked) == 20 * 3
    assert memory.cache.tokens == 20 * 4
    assert asked.count == 20 * 2 + 20, "each end, and what is an end now"
    assert memory.length((20, 1, 2, 7)) == 3


def test_what_is_left_is_looked_at_again() -> None:
    """It may end with the beginning of a document, which was none while something else followed."""
    memory = Memory()
    memory.insert((5, 1, 2, 1, 2, 3))
    assert memory.cache.erase(finder([(1, 2, 3)], 0)) == 5
    assert memory.length((5, 1)) == 1
