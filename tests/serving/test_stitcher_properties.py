"""Random requests with and without documents, cancelled at random: right answers, and nothing left over."""

import dataclasses
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.serving import wire
from appliance.serving.cache import common_length
from appliance.serving.events import DocumentCounts, Finished
from appliance.serving.kept_documents import KeptDocuments
from appliance.serving.passages import Passages
from appliance.serving.requests import Document
from appliance.serving.snapshots import Identity, SnapshotStore
from tests.serving.counting_decoder import END, CountingDecoder
from tests.serving.held_tokens import places
from tests.serving.scheduler_bench import WAIT_SECONDS, Bench, Client, until

CONTEXT_TOKENS = 160
SYSTEM = tuple(range(1000, 1015))
DOCUMENTS = [tuple(range(100 * at, 100 * at + size)) for at, size in enumerate((1, 5, 12, 30, 34, 40), start=20)]


def follow(history: tuple[int, ...]) -> int:
    """Depends on all that was before."""
    value = sum(history) * 31 % 50
    return END if value == 7 else value + 1


@dataclasses.dataclass(frozen=True)
class Ask:
    documents: tuple[int, ...]
    question: tuple[int, ...]
    max_tokens: int
    n: int
    tenant: str
    adapter: str | None
    is_cancelled: bool
    is_plain: bool  # the same tokens, but nobody says that they are documents

    @property
    def prompt(self) -> tuple[int, ...]:
        return (*SYSTEM, *(token for at in self.documents for token in DOCUMENTS[at]), *self.question)

    @property
    def passages(self) -> Passages | None:
        bounds = [len(SYSTEM)]
        for at in self.documents:
            bounds.append(bounds[-1] + len(DOCUMENTS[at]))
        is_told = self.documents and not self.is_plain
        return Passages(tuple(bounds), (None,) * len(self.documents)) if is_told else None

    def answer(self) -> tuple[int, ...]:
        """What the model says when nobody cancels, the end included."""
        said: list[int] = []
        while len(said) < min(self.max_tokens, CONTEXT_TOKENS - len(self.prompt)) and END not in said:
            said.append(follow((*self.prompt, *said)))
        return tuple(said)


asks = st.builds(
    Ask,
    documents=st.lists(st.integers(0, len(DOCUMENTS) - 1), max_size=4, unique=True).map(tuple),
    question=st.lists(st.integers(1, 3), min_size=1, max_size=5).map(tuple),
    max_tokens=st.integers(1, 8),
    n=st.sampled_from([1, 1, 1, 2]),
    tenant=st.sampled_from(["a", "a", "b"]),
    adapter=st.sampled_from([None, None, None, "x"]),
    is_cancelled=st.booleans() | st.just(False),
    is_plain=st.sampled_from([False, False, True]),
)


@settings(max_examples=500, deadline=None)
@given(
    slots=st.integers(1, 3),
    cache_tokens=st.sampled_from([0, 60, 150, 1000]),
    reread_tokens=st.sampled_from([None, 0, 0, 1, 5, 16]),
    store_bytes=st.sampled_from([None, 3000, 10**6]),
    refusals=st.integers(0, 2),
    folders=st.dictionaries(st.integers(0, 7), st.frozensets(st.integers(0, len(DOCUMENTS) - 1)), max_size=3),
    script=st.lists(asks, min_size=1, max_size=8),
)
def test_random_mixes(
    slots: int,
    cache_tokens: int,
    reread_tokens: int | None,
    store_bytes: int | None,
    refusals: int,
    folders: dict[int, frozenset[int]],
    script: list[Ask],
) -> None:
    """`folders` are what the operator's folder holds from a request of the script on."""
    decoder = CountingDecoder(slots=slots, context_tokens=CONTEXT_TOKENS, follow=follow, can_move=True)
    decoder.restore_failures = ["refused"] * refusals
    folder = Path(tempfile.mkdtemp())
    try:
        store = None
        if store_bytes is not None:
            identity = Identity(model_sha256="m", template_sha256="t", kv_type="f16", layout="l")
            store = SnapshotStore(folder / "snapshots", store_bytes, identity)
        with Bench(
            decoder, queue_requests=20, cache_tokens=cache_tokens, reread_tokens=reread_tokens, snapshots=store
        ) as bench:
            kept = KeptDocuments(bench.scheduler.documents, _encoded, store, "m")
            clients = []
            for number, ask in enumerate(script):
                if number in folders:
                    _follow(kept, folders[number])
                fields = {"max_tokens": ask.max_tokens, "n": ask.n, "tenant": ask.tenant, "adapter": ask.adapter}
                client = bench.client(*ask.prompt, passages=ask.passages, shared=len(SYSTEM), **fields)
                clients.append((ask, client))
                if ask.is_cancelled:
                    client.cancel()
            ends = [_check(ask, client, is_stitching=reread_tokens is not None) for ask, client in clients]
            for at, (ask, _) in enumerate(clients):
                others = [(other, ends[number]) for number, (other, _) in enumerate(clients) if number != at]
                _check_exact(ask, ends[at], others)
            bench.idle()
            until(lambda: (bench.scheduler.load().documents or DocumentCounts()).waiting == 0)
            kept.close()
            for at in _erased(folders, script):
                assert places(bench, store, lambda tokens: bool({*DOCUMENTS[at]} & {*tokens})) == []  # noqa: B023
            assert decoder.samplers == {}
            load = bench.scheduler.load()
            assert load.kv_cells_running == 0
            assert load.kv_cells_used == decoder.used_cells <= load.kv_cells
            assert load.cached_tokens <= cache_tokens
        assert store_bytes is None or sum(path.stat().st_size for path in folder.rglob("*.prefix")) <= store_bytes
    finally:
        shutil.rmtree(folder)


def _encoded(document: Document) -> Sequence[int]:
    return DOCUMENTS[int(document.id)] if document.id.isdigit() else ()


def _follow(kept: KeptDocuments, folder: frozenset[int]) -> None:
    documents = tuple(Document(id=str(at), text="x") for at in sorted(folder))
    kept.keep(wire.Documents(documents=documents, is_read_ahead=True))
    kept._thread.submit(bool).result(WAIT_SECONDS)


def _erased(folders: dict[int, frozenset[int]], script: Sequence[Ask]) -> set[int]:
    """Documents that were removed, and that nobody has sent since."""
    erased: set[int] = set()
    folder: frozenset[int] = frozenset()
    for number, ask in enumerate(script):
        if number in folders:
            erased = (erased | folder) - folders[number]
            folder = folders[number]
        erased -= {*ask.documents}
    return erased


def _check_exact(ask: Ask, ends: Sequence[Finished], others: Sequence[tuple[Ask, Sequence[Finished]]]) -> None:
    """What a plain prompt found had been read where it stands: nothing of a document that was read by itself."""
    if ask.passages is not None or ask.n > 1:
        return
    known = [SYSTEM]
    for other, found in others:
        if (other.tenant, other.adapter) == (ask.tenant, ask.adapter) and any(end.documents != "stitched" for end in found):
            known.append((*other.prompt, *other.answer()))
    assert all(end.cached_tokens <= max(common_length(each, ask.prompt) for each in known) for end in ends)


def _check(ask: Ask, client: Client, *, is_stitching: bool) -> list[Finished]:
    ends = [end for end in client.ends() if isinstance(end, Finished)]
    assert [end.index for end in ends] == list(range(ask.n))
    assert client.events.empty()
    said = ask.answer()
    whole = "".join(f"{token} " for token in said if token != END)
    for end in ends:
        text = client.texts.get(end.index, "")
        assert end.documents != "stitched" or is_stitching
        assert (end.documents is None) == (ask.passages is None)
        assert 0 <= end.stitched_tokens <= end.cached_tokens < end.prompt_tokens
        if end.reason == "cancelled":
            assert ask.is_cancelled
            assert whole.startswith(text)
        else:
            assert (text, end.generated_tokens) == (whole, len(said))
    return ends
