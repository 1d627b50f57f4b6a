"""Token buckets: never more than the limit in any minute, honest waiting times, a bounded table."""

from hypothesis import given
from hypothesis import strategies as st

from appliance.serving.limits import RateLimit


@given(st.integers(1, 30), st.lists(st.floats(0.0, 30.0), max_size=120))
def test_never_more_than_a_full_bucket_and_its_refill(per_minute: int, pauses: list[float]) -> None:
    now = [0.0]
    limit = RateLimit(per_minute, clock=lambda: now[0])
    passed: list[float] = []
    for pause in pauses:
        now[0] += pause
        wait = limit.wait_seconds("k")
        if wait == 0:
            passed.append(now[0])
            continue
        now[0] += wait
        assert limit.wait_seconds("k") == 0, "the time it names is enough"
        passed.append(now[0])
    for start in range(len(passed)):
        for end in range(start, len(passed)):
            allowed = per_minute + (passed[end] - passed[start]) * per_minute / 60.0
            assert end - start + 1 <= allowed + 1e-6


def test_burst_then_wait() -> None:
    now = [0.0]
    limit = RateLimit(3, clock=lambda: now[0])
    assert [limit.wait_seconds("k") for _ in range(4)] == [0, 0, 0, 20]
    assert limit.wait_seconds("other") == 0
    now[0] = 19.0
    assert limit.wait_seconds("k") == 1
    now[0] = 20.0
    assert limit.wait_seconds("k") == 0


def test_no_limit() -> None:
    limit = RateLimit(0)
    assert not any(limit.wait_seconds("k") for _ in range(1000))


def test_table_is_bounded_and_forgets_the_idle_first() -> None:
    limit = RateLimit(1, clock=lambda: 0.0, max_buckets=10)
    for number in range(1000):
        limit.wait_seconds(f"k{number}")
    assert all(limit.wait_seconds(f"k{number}") for number in range(990, 1000))
    assert limit.wait_seconds("k989") == 0
    assert limit.wait_seconds("k990") == 0, "the one used longest ago made room"
