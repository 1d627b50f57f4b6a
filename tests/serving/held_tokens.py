"""Where a scheduler holds something of a document: looked for in cache, slots, cells, notes and files, token by token."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from appliance.serving import document_erasure, prefix_file
from appliance.serving.cache import Node
from appliance.serving.snapshots import SnapshotStore
from tests.serving.scheduler_bench import Bench

TOKEN_IDS = (1 << 31) - 1


def places(bench: Bench, store: SnapshotStore | None, is_held: Callable[[Sequence[int]], bool]) -> list[str]:
    """The kinds of places; `is_held` judges token ids."""
    found = {where for where, tokens in _all(bench, store) if is_held([token & TOKEN_IDS for token in tokens])}
    return sorted(found)


def in_files(store: SnapshotStore | None) -> Iterator[list[int]]:
    for path in sorted(store.folder.iterdir()) if store is not None else ():
        if path.suffix == ".json":
            yield from document_erasure._read(path).values()
        elif (fields := prefix_file.told(path)) is not None:
            yield fields["tokens"]
        elif path.name != document_erasure.LOCK:
            assert path.suffix == prefix_file.PARTIAL_SUFFIX, path  # the beginning of a file that is being written


def _all(bench: Bench, store: SnapshotStore | None) -> Iterator[tuple[str, Sequence[int]]]:
    prefixes = bench.scheduler._prefixes
    with bench.together():
        yield from (("cache", tokens) for tokens in _paths(prefixes._cache._roots.values()))
        yield from (("slot", left.prefix.tokens) for left in prefixes._slots.left.values())
        noted = (*(prefixes._sightings.all if prefixes._sightings is not None else ()), *prefixes._documents)
        yield from (("notes", prefix.tokens) for prefix in noted)
        for slot, cells in bench.decoder.held.items():
            if slot not in prefixes._slots.running:
                yield "cells", [cells[at].token for at in sorted(cells)]
    yield from (("file", tokens) for tokens in in_files(store))


def _paths(nodes: Iterable[Node], above: Sequence[int] = ()) -> Iterator[list[int]]:
    for node in nodes:
        tokens = [*above, *node.tokens]
        yield tokens
        yield from _paths(node.children.values(), tokens)
