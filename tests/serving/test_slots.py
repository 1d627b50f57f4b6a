"""Where answers go: side by side, and where least is lost."""

from hypothesis import given
from hypothesis import strategies as st

from appliance.serving.job import Job
from appliance.serving.slots import Slots
from appliance.serving.snapshots import Prefix


def job(computed: int = 1) -> Job:
    return Job([1] * computed, computed, None, None, computed=computed)


def filled(count: int, running: dict[int, int], left: str = "") -> Slots:
    """Running jobs by slot and tokens; others have left something in their slots, in this order."""
    slots = Slots(count)
    jobs = {slot: job() for slot in map(int, left)}
    for slot, each in jobs.items():
        slots.enter(slot, each)
    for each in jobs.values():
        slots.leave(each, Prefix((1, 2)))
    for slot, computed in running.items():
        slots.enter(slot, job(computed))
    return slots


def test_empty_slots_go_first_then_what_the_cache_has_then_the_oldest() -> None:
    slots = filled(4, {}, left="312")
    assert slots.choose(None) == 0
    slots = filled(3, {}, left="201")
    assert slots.choose(None) == 2
    slots.note_cached(1)
    assert slots.choose(None) == 1
    assert slots.choose(0) == 0, "what is wanted is there"


def test_answers_go_beside_others_and_first_between_them() -> None:
    slots = filled(6, {3: 9}, left="01245")
    assert slots.choose(0) == slots.choose(None) == 2
    assert slots.choose(4) == 4
    assert filled(6, {1: 9, 4: 9}, left="5").choose(5) in (2, 3)
    assert filled(3, {0: 5}, left="21").choose(2) == 1


def test_as_few_tokens_as_can_be_are_moved() -> None:
    assert filled(5, {0: 100, 2: 10, 3: 10}).moves() == [(3, 1)]
    assert filled(5, {0: 100, 1: 100, 3: 10}).moves() == [(3, 2)]
    assert filled(6, {0: 500, 5: 10}).moves() == [(5, 1)]
    assert filled(5, {1: 3, 2: 3}).moves() == filled(5, {4: 3}).moves() == filled(5, {}).moves() == []


def test_what_is_left_is_what_was_kept() -> None:
    slots = filled(2, {0: 3})
    (running,) = slots.running.values()
    assert [(slot, prefix.tokens) for slot, prefix in slots.held()] == [(0, (1, 1, 1))]
    slots.moved(0, 1)
    assert (running.slot, slots.free) == (1, [0])
    slots.leave(running, Prefix((1, 1)))
    assert [(slot, prefix.tokens) for slot, prefix in slots.held()] == [(1, (1, 1))]
    slots.enter(1, running)
    slots.leave(running, Prefix(()))
    assert list(slots.held()) == []


@given(st.integers(1, 8), st.dictionaries(st.integers(0, 7), st.integers(1, 50)))
def test_moves_bring_all_together(count: int, running: dict[int, int]) -> None:
    slots = filled(count, {slot: computed for slot, computed in running.items() if slot < count})
    for source, target in slots.moves():
        assert target in slots.free
        slots.moved(source, target)
    places = sorted(slots.running)
    assert places == list(range(places[0], places[0] + len(places))) if places else True
    assert slots.moves() == []
    if slots.free:
        slots.enter(slots.choose(None), job())
        assert slots.moves() == []
