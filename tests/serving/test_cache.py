"""The radix tree: what is found is right, what is in use stays, and its book-keeping matches the memory."""

from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.serving.cache import Node, PrefixCache, common_length
from appliance.serving.decoder import Adapter, Feed
from appliance.serving.requests import SamplingSettings
from tests.serving.counting_decoder import CountingDecoder

LONG = tuple(range(100, 200))


class Memory:
    """A cache over a counting decoder, whose slot 0 computes what is inserted and slot 1 what is attached."""

    def __init__(self, parked: int = 6, saved_limit: int = 0) -> None:
        self.decoder = CountingDecoder(slots=2, context_tokens=400, cells=10_000, sequences=2 + parked)
        self.cache = PrefixCache(self.decoder, range(2, 2 + parked), saved_limit)

    def insert(self, tokens: tuple[int, ...], owner: str | None = "a", adapter: Adapter | None = None) -> int:
        self.decoder.start(0, SamplingSettings(), None, None)
        self.decoder.decode([Feed(0, tokens, 0, False)], adapter)
        _, added = self.cache.insert(adapter, owner, tokens, 0)
        self.decoder.release(0)
        return added

    def length(self, tokens: tuple[int, ...], owner: str | None = "a", adapter: Adapter | None = None) -> int:
        return self.cache.match(adapter, owner, tokens, len(tokens)).length

    def attach(self, tokens: tuple[int, ...], owner: str | None = "a", adapter: Adapter | None = None) -> tuple[Node, int]:
        """Attaches what is known of the tokens and computes the rest on top, which checks every cell."""
        match = self.cache.match(adapter, owner, tokens, len(tokens) - 1)
        self.decoder.start(1, SamplingSettings(), None, None)
        match = self.cache.attach(match, 1)
        self.decoder.decode([Feed(1, tokens[match.length :], match.length, True)], adapter)
        self.decoder.release(1)
        return match.node, match.length


def test_prefixes_are_stored_once() -> None:
    memory = Memory()
    assert memory.insert(LONG) == 100
    assert memory.insert(LONG) == 0
    assert memory.insert((*LONG[:60], 1, 2)) == 2
    assert memory.length((*LONG[:60], 1, 2, 3)) == 62
    assert memory.length((*LONG, 5)) == 100
    assert memory.length(LONG[:70]) == 70
    assert memory.cache.cells == memory.decoder.used_cells == 102


def test_continued_conversation_needs_no_further_sequence() -> None:
    memory = Memory(parked=1)
    for end in (20, 50, 100):
        memory.insert(LONG[:end])
    assert memory.length(LONG) == 100


def test_owners_and_adapters_are_apart_and_the_operators_text_is_for_all() -> None:
    memory = Memory()
    memory.insert(LONG[:40], owner=None)
    memory.insert(LONG[:80], owner="a")
    assert memory.cache.cells == memory.decoder.used_cells == 80
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
    memory = Memory()
    memory.insert((*LONG[:50], 1, 1, 1))
    memory.insert((*LONG[:50], 2, 2, 2))
    memory.attach((*LONG[:50], 1, 1, 1, 9))
    for node in list(memory.cache._nodes):
        node.users = 0
    memory.cache.park(2)
    assert memory.length((*LONG[:50], 2, 2, 2)) == 51
    assert memory.length((*LONG[:50], 1, 1, 1)) == 53
    memory.cache.park(4)
    assert memory.length((*LONG[:50], 1, 1, 1)) == 50
    assert memory.cache.cells == memory.decoder.used_cells == 50


def test_operators_text_goes_last() -> None:
    memory = Memory()
    memory.insert(LONG[:40], owner=None)
    memory.insert((1, 2, 3), owner="a")
    memory.cache.park(3)
    assert memory.length(LONG, owner=None) == 40
    memory.cache.park(1000)
    assert memory.cache.cells == memory.decoder.used_cells == 0


def test_what_is_in_use_stays() -> None:
    memory = Memory(parked=2)
    memory.insert(LONG)
    node, _ = memory.attach((*LONG[:60], 7))
    memory.cache.park(1000)
    assert memory.length(LONG) == 60
    assert memory.insert((1, 2, 3)) == 3
    assert memory.insert((4, 5, 6)) == 3  # takes the sequence of the one before
    assert memory.length(LONG) == 60
    assert memory.insert((*LONG[:30], 7)) == 0  # would need two more sequences
    memory.cache.unlock(node)
    memory.cache.park(1000)
    assert memory.cache.cells == memory.decoder.used_cells == 0


def test_what_another_holds_does_not_grow() -> None:
    memory = Memory()
    memory.insert(LONG[:50])
    memory.attach((*LONG[:50], 9))
    memory.insert(LONG[:80])
    memory.cache.park(1000)
    assert memory.length(LONG) == 50


def test_nothing_is_kept_without_sequences() -> None:
    memory = Memory(parked=0)
    assert memory.insert(LONG) == 0
    assert memory.length(LONG) == 0


def test_trees_of_scales_that_clients_choose_do_not_pile_up() -> None:
    memory = Memory(parked=2)
    for scale in range(50):
        memory.insert((1, 2, 3), adapter=Adapter("x", float(scale)))
    assert len(memory.cache._roots) <= 4


def test_saved_prefixes_leave_the_kv_memory_and_come_back() -> None:
    memory = Memory(saved_limit=200)
    memory.insert(LONG)
    memory.insert((*LONG[:60], 7, 8))
    memory.cache.park()
    assert memory.cache.cells == memory.decoder.used_cells == 0
    assert memory.cache.saved_tokens == 102
    computed = memory.decoder.computed
    for text in ((*LONG, 5), (*LONG[:60], 7, 8, 9), (*LONG[:80], 1)):
        node, length = memory.attach(text)
        assert length == len(text) - 1
        memory.cache.unlock(node)
    assert memory.decoder.computed - computed == 3
    assert memory.cache.cells == memory.decoder.used_cells == 102


def test_idle_moments_save_what_then_leaves_without_being_copied() -> None:
    memory = Memory(saved_limit=200)
    memory.insert(LONG)
    node, _ = memory.attach((*LONG, 5))
    assert memory.cache.save_one() is False, "it is in use"
    memory.cache.unlock(node)
    assert memory.cache.save_one() is True
    assert memory.cache.save_one() is False
    assert (memory.cache.cells, memory.cache.saved_tokens) == (100, 100)
    memory.decoder.save = None  # type: ignore[assignment,method-assign]
    memory.cache.park()
    assert (memory.cache.cells, memory.length(LONG)) == (0, 100)


def test_last_used_are_saved_and_the_rest_stays_until_its_room_is_needed() -> None:
    memory = Memory(saved_limit=100)
    for first in (100, 300, 500):
        memory.insert(tuple(range(first, first + 50)))
    memory.cache.park()
    assert (memory.cache.cells, memory.cache.saved_tokens) == (50, 100)
    memory.cache.park(30)
    assert [memory.length(tuple(range(first, first + 50))) for first in (100, 300, 500)] == [20, 50, 50]
    memory.insert(tuple(range(700, 750)))
    memory.cache.park()
    assert [memory.length(tuple(range(first, first + 50))) for first in (100, 300, 500, 700)] == [20, 0, 50, 50]
    assert (memory.cache.cells, memory.cache.saved_tokens) == (20, 100)


def test_what_a_saved_prefix_continues_with_is_saved_alone() -> None:
    memory = Memory(saved_limit=200)
    memory.insert(LONG[:50])
    memory.cache.park()
    memory.insert(LONG)
    assert memory.cache.cells == memory.decoder.used_cells == 50
    memory.cache.park()
    assert (memory.cache.cells, memory.cache.saved_tokens) == (0, 100)
    assert memory.attach((*LONG, 5))[1] == 100


def test_text_that_leaves_a_saved_prefix_halfway_splits_it() -> None:
    memory = Memory(saved_limit=200)
    memory.insert(LONG)
    memory.cache.park()
    assert memory.insert((*LONG[:60], 7, 8)) == 62, "with the beginning, which is in the KV memory now"
    assert memory.cache.cells == memory.decoder.used_cells == 62
    for text in ((*LONG, 5), (*LONG[:60], 7, 8, 9)):
        node, length = memory.attach(text)
        assert length == len(text) - 1
        memory.cache.unlock(node)
    memory.cache.park()
    assert (memory.cache.cells, memory.cache.saved_tokens) == (0, 60 + 2 + 100)


def test_cells_that_cannot_be_loaded_are_forgotten_with_what_continues_them() -> None:
    memory = Memory(saved_limit=200)
    memory.insert(LONG[:40])
    memory.cache.park()
    memory.insert(LONG[:80])
    memory.cache.park()
    memory.insert(LONG)
    memory.cache.park()
    memory.decoder.restore_failures += ["no memory"]
    assert memory.attach((*LONG, 5))[1] == 0
    assert (memory.length(LONG), memory.cache.cells, memory.cache.saved_tokens) == (0, 0, 0)


def test_cells_that_find_no_sequence_are_loaded_another_time() -> None:
    memory = Memory(parked=1, saved_limit=200)
    memory.insert(LONG)
    memory.cache.park()
    memory.insert((1, 2, 3))
    node, _ = memory.attach((1, 2, 3, 4))
    assert memory.attach((*LONG, 5))[1] == 0
    memory.cache.unlock(node)
    assert memory.attach((*LONG, 5))[1] == 100


def test_cells_that_cannot_be_loaded_leave_what_others_use_behind_them() -> None:
    memory = Memory(saved_limit=200)
    memory.insert(LONG[:40])
    memory.cache.park()
    memory.insert(LONG)
    child = memory.cache.match(None, "a", LONG, 100).node
    memory.cache.lock(child)
    memory.decoder.restore_failures += ["no memory"]
    assert memory.attach((*LONG, 5))[1] == 0
    assert (memory.length(LONG), memory.cache.cells, memory.decoder.used_cells) == (100, 60, 60)
    memory.cache.unlock(child)


tokens = st.lists(st.integers(1, 2), min_size=2, max_size=6).map(
    lambda blocks: tuple(token for block in blocks for token in range(block * 100, block * 100 + 20))
)
owners = st.sampled_from([None, "a", "b"])


@settings(max_examples=80, deadline=None)
@given(
    parked=st.integers(0, 6),
    saved_limit=st.sampled_from([0, 30, 100, 1000]),
    script=st.lists(
        st.tuples(
            st.sampled_from(["insert", "attach", "unlock", "park", "room", "save", "break", "clear"]),
            tokens,
            owners,
            st.integers(1, 60),
        ),
        max_size=30,
    ),
)
def test_random_use(parked: int, saved_limit: int, script: list[tuple[str, tuple[int, ...], str | None, int]]) -> None:
    memory, held, known = Memory(parked, saved_limit), [], []
    for action, text, owner, number in script:
        if action == "insert":
            memory.insert(text[:-number], owner) if number < len(text) else None
            known.append((text, owner))
        elif action == "attach":
            node, length = memory.attach(text, owner)
            held.append((node, text[:length], owner))
            assert length <= max((common_length(each, text) for each, of in known if of in (None, owner)), default=0)
        elif action == "unlock" and held:
            memory.cache.unlock(held.pop(number % len(held))[0])
        elif action == "save":
            memory.cache.save_one()
        elif action == "break" and number < 20 and not memory.decoder.restore_failures:
            memory.decoder.restore_failures.append("broken")
        elif action == "park":
            memory.cache.park()
            assert saved_limit < 1000 or memory.cache.free_cells == 0
        elif action == "room":
            memory.cache.park(number)
        elif action == "clear" and not held and number < 10:
            memory.decoder.clear()
            memory.cache.clear()
        for _, text_held, of in held:
            assert memory.length(text_held, of) == len(text_held)
        assert memory.cache.cells == memory.decoder.used_cells
        assert 0 <= memory.cache.free_cells <= memory.cache.cells
        assert memory.cache.saved_tokens == sum(node.saved_tokens for node in memory.cache._nodes) <= saved_limit
        assert all(node.saved or node.sequence is not None for node in memory.cache._nodes)
    for node, _, _ in held:
        memory.cache.unlock(node)
    assert memory.cache.free_cells == memory.cache.cells
    memory.cache.park(10_000)
    assert memory.decoder.used_cells == 0
    assert memory.decoder.problems == []
