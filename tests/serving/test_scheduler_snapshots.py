"""Prefixes on disk: what is written and what never is, what a restart finds, and files that are lost or broken."""

import os
import threading
import time
from pathlib import Path

import pytest

from appliance.serving.decoder import SavedCells
from appliance.serving.snapshots import Identity, Prefix, SnapshotStore
from tests.serving.scheduler_bench import Bench, bench_of, cached, numbers, until

SYSTEM = tuple(range(100, 140))
LONG_SYSTEM = tuple(range(1000, 1100))


@pytest.fixture(autouse=True)
def no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle work begins at once."""
    monkeypatch.setattr("appliance.serving.scheduler.SETTLE_SECONDS", 0.0)


def store_in(folder: Path) -> SnapshotStore:
    return SnapshotStore(folder, 10**6, Identity(model_sha256="m", template_sha256="t", kv_type="f16", layout="1"))


def test_shared_prefix_outlives_a_restart(tmp_path: Path) -> None:
    with bench_of(snapshots=store_in(tmp_path)) as bench:
        for last in (1, 2):
            bench.client(*SYSTEM, last, shared=len(SYSTEM), tenant="a").end()
            bench.idle()
        bench.client(*SYSTEM, 3, *SYSTEM, shared=0).end()
        until(lambda: len(list(tmp_path.glob("*.prefix"))) == 1)
    assert store_in(tmp_path).prefixes() == [Prefix(SYSTEM, None, "a")]
    with bench_of(snapshots=store_in(tmp_path)) as bench:
        until(lambda: bench.scheduler._prefixes.has(Prefix(SYSTEM, None, "a")))  # no request waits for so short a file
        assert cached(bench.client(*SYSTEM, 5, tenant="b")) == 0
        assert cached(bench.client(*SYSTEM, 5, tenant="a")) == len(SYSTEM)


def test_prefix_of_one_request_is_not_written(tmp_path: Path) -> None:
    with bench_of(snapshots=store_in(tmp_path)) as bench:
        assert len(bench.client(*SYSTEM, 1, shared=len(SYSTEM), n=3).ends()) == 3
        bench.idle()
        time.sleep(0.05)
        assert list(tmp_path.iterdir()) == []


def test_operators_prefix_is_written_and_not_read_again(tmp_path: Path) -> None:
    with bench_of(snapshots=store_in(tmp_path)) as bench:
        bench.scheduler.warm(SYSTEM)
        until(lambda: len(list(tmp_path.glob("*.prefix"))) == 1)
    with bench_of(snapshots=store_in(tmp_path)) as bench:
        bench.scheduler.warm(SYSTEM)
        until(lambda: bench.scheduler._prefixes.has(Prefix(SYSTEM, None, None)))
        assert cached(bench.client(*SYSTEM, 5)) == len(SYSTEM)
        bench.idle()
        assert bench.decoder.computed == 1 + 4


def test_visitors_text_is_never_written(tmp_path: Path) -> None:
    with bench_of(snapshots=store_in(tmp_path)) as bench:
        secret = tuple(range(7000, 7100))
        for _ in range(3):
            bench.client(*SYSTEM, *secret, shared=len(SYSTEM)).end()
            bench.idle()
        until(lambda: len(list(tmp_path.glob("*.prefix"))) == 1)
        bench.idle()
    assert b"7000" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


def small_bench(folder: Path) -> Bench:
    return bench_of(slots=2, cache_tokens=200, snapshots=store_in(folder))


def pushed_out(bench: Bench) -> None:
    """Two requests under one system prompt, which is on disk then, and whose cells make room for others'."""
    for last in (1, 2):
        bench.client(*LONG_SYSTEM, last, shared=len(LONG_SYSTEM), tenant="a").end()
        bench.idle()
    store = bench.scheduler._prefixes._store
    assert store is not None
    until(lambda: Prefix(LONG_SYSTEM, None, "a") in store)
    for first in (2000, 3000, 4000):
        bench.client(*range(first, first + 150)).end()
        bench.idle()
    assert bench.scheduler._prefixes.has(Prefix(LONG_SYSTEM, None, "a")) is False


def test_prefix_that_memory_has_lost_comes_back_from_disk(tmp_path: Path) -> None:
    with small_bench(tmp_path) as bench:
        pushed_out(bench)
        before = bench.decoder.computed
        again = bench.client(*LONG_SYSTEM, 5, tenant="a")
        assert (cached(again), again.text) == (len(LONG_SYSTEM), numbers(6, 5))
        assert bench.decoder.computed - before == 1 + 4
        assert cached(bench.client(*LONG_SYSTEM, 5, tenant="b")) == 0, "what another's key has written"


def test_others_are_answered_while_a_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_bench(tmp_path) as bench:
        pushed_out(bench)
        is_read = threading.Event()
        read = SnapshotStore.read

        def slow_read(store: SnapshotStore, prefix: Prefix) -> bytes | None:
            assert is_read.wait(10)
            return read(store, prefix)

        monkeypatch.setattr(SnapshotStore, "read", slow_read)
        waiting, gone = (bench.client(*LONG_SYSTEM, last, tenant="a") for last in (5, 6))
        assert bench.client(7).reason() == "length"
        gone.cancel()
        assert gone.reason() == "cancelled"
        is_read.set()
        assert (cached(waiting), waiting.text) == (len(LONG_SYSTEM), numbers(6, 5))


def test_nobody_waits_at_a_start_for_files_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_bench(tmp_path) as bench:
        pushed_out(bench)
    may_read = threading.Event()
    were_read = []
    read = SnapshotStore.read

    def slow_read(store: SnapshotStore, prefix: Prefix) -> SavedCells | None:
        may_read.wait(5)
        were_read.append(prefix)
        return read(store, prefix)

    monkeypatch.setattr(SnapshotStore, "read", slow_read)
    with small_bench(tmp_path) as bench:
        assert bench.client(7).reason() == "length"
        assert not were_read
        waiting = bench.client(*LONG_SYSTEM, 5, tenant="a")
        may_read.set()
        assert (cached(waiting), waiting.text) == (len(LONG_SYSTEM), numbers(6, 5))


def test_what_memory_held_is_back_before_anybody_asks(tmp_path: Path) -> None:
    with small_bench(tmp_path) as bench:
        pushed_out(bench)
    with small_bench(tmp_path) as bench:
        until(lambda: bench.scheduler._prefixes.has(Prefix(LONG_SYSTEM, None, "a")))
        assert bench.decoder.computed == 0


def test_what_was_used_last_comes_back_and_leaves_last(tmp_path: Path) -> None:
    """Of three files whose pages there is room for two of; in memory and on disk their order stays."""
    texts = [tuple(range(start, start + 100)) for start in (1000, 2000, 3000)]
    with bench_of(snapshots=store_in(tmp_path)) as bench:
        cell_bytes = bench.decoder.cell_bytes
        for text in texts:
            for last in (1, 2):
                bench.client(*text, last, shared=len(text), tenant="a").end()
            bench.idle()
            until(lambda: any(each.tokens == text for each in store_in(tmp_path).prefixes()))  # noqa: B023
    for age, prefix in enumerate(store_in(tmp_path).prefixes()):
        path = store_in(tmp_path)._paths[prefix]
        os.utime(path, (1e9 - age, 1e9 - age))
    recent = store_in(tmp_path).prefixes()
    store = store_in(tmp_path)
    store._limit_bytes = 250 * cell_bytes
    with bench_of(snapshots=store) as bench:
        until(lambda: not bench.scheduler._recall._from_before)
        until(lambda: bench.scheduler._prefixes._cache._held[True] == 200)
        used = {node.tokens: node.used_at for node in bench.scheduler._prefixes._cache._nodes}
        assert sorted(used, key=lambda each: -used[each]) == [each.tokens for each in recent[:2]]
    assert store_in(tmp_path).prefixes() == recent


def test_broken_file_is_deleted_and_the_prefix_read(tmp_path: Path) -> None:
    with small_bench(tmp_path) as bench:
        pushed_out(bench)
        (path,) = tmp_path.glob("*.prefix")
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        again = bench.client(*LONG_SYSTEM, 5, tenant="a")
        assert (cached(again), again.text) == (0, numbers(6, 5))
        assert not path.exists()


def test_file_is_of_use_without_any_cache(tmp_path: Path) -> None:
    with bench_of(snapshots=store_in(tmp_path)) as bench:
        bench.scheduler.warm(SYSTEM)
        until(lambda: len(list(tmp_path.glob("*.prefix"))) == 1)
    with bench_of(slots=1, cache_tokens=0, snapshots=store_in(tmp_path)) as bench:
        bench.scheduler.warm(SYSTEM)
        until(lambda: bench.scheduler._prefixes.has(Prefix(SYSTEM, None, None)))
        for last in (5, 6):
            assert cached(bench.client(*SYSTEM, last)) == len(SYSTEM)
            assert cached(bench.client(1, 2, 3)) == 0
        assert bench.scheduler.load().cached_tokens == 0


def test_refused_snapshot_is_deleted_and_the_prefix_read(tmp_path: Path) -> None:
    store_in(tmp_path).write(Prefix(SYSTEM, None, ""), b"[0, null, [[-1, 0]]]")
    with bench_of(snapshots=store_in(tmp_path)) as bench:
        until(lambda: not list(tmp_path.iterdir()))  # of so short a file no request waits
        client = bench.client(*SYSTEM, 5)
        assert (cached(client), client.text) == (0, numbers(6, 5))
