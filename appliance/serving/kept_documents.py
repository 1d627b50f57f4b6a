"""The operator's documents in an engine's process: made into tokens, read ahead where that is of use, erased when removed.

In a thread of its own, one change after the other: tokens of many documents take seconds, and files to be deleted wait for
a disk.
"""

import concurrent.futures
import contextlib
import logging
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence

from appliance.serving import document_erasure, passages
from appliance.serving.cache import common_length
from appliance.serving.document_erasure import ErasedFiles
from appliance.serving.document_orders import Change, DocumentOrders
from appliance.serving.requests import Document
from appliance.serving.runs import Run, finder
from appliance.serving.snapshots import Prefix, SnapshotStore
from appliance.serving.wire import Documents

logger = logging.getLogger("appliance.serving")


class KeptDocuments:
    """`encode` makes a document's tokens, as they stand in prompts."""

    def __init__(
        self,
        orders: DocumentOrders,
        encode: Callable[[Document], Sequence[int]],
        store: SnapshotStore | None,
        model_sha256: str,
    ) -> None:
        self._orders = orders
        self._encode = encode
        self._store = store
        self._model_sha256 = model_sha256
        self._runs: dict[str, tuple[int, ...]] = {}  # tokens by digest: what there is now
        self._is_told = False  # that nothing is read ahead
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "documents")

    def keep(self, asked: Documents) -> None:
        """Follows what is in the folder now; returns at once."""
        self._thread.submit(self._follow, asked)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _follow(self, asked: Documents) -> None:
        try:
            self._keep(asked)
        except concurrent.futures.CancelledError:
            logger.warning("event=documents_not_followed reason='the engine ends'")
        except Exception as error:  # its message may hold text of a document
            where = "".join(traceback.format_tb(error.__traceback__))
            logger.error("event=documents_not_followed type=%s\n%s", type(error).__name__, where)

    def _keep(self, asked: Documents) -> None:
        names = {document_erasure.digest(each): each for each in asked.documents}
        runs = {name: self._runs.get(name) or tuple(self._encode(each)) for name, each in names.items()}
        removed = {name: run for name, run in self._runs.items() if name not in runs}
        if self._store is not None:
            noted = document_erasure.noted(self._store.folder, self._model_sha256)
            removed |= {name: tuple(run) for name, run in noted.items() if name not in runs}
            self._note(runs)
        documents: Mapping[Prefix, str] = {}
        if asked.is_read_ahead and self._orders.is_stitching:
            documents = {Prefix(passages.alone(run)): names[name].id for name, run in runs.items()}
        elif asked.is_read_ahead and runs and not self._is_told:
            self._is_told = True
            logger.warning(
                "event=documents_not_read_ahead documents=%d reason='they are read in their place here'", len(runs)
            )
        find = finder([Run(run, self._opening) for run in removed.values()]) if removed else None
        self._follow_change(Change(documents, find, asked.refused, len(removed)), runs)
        self._runs = runs

    def _note(self, runs: Mapping[str, Sequence[int]]) -> None:
        """Before the first of their files is written, so that it will be found again."""
        assert self._store is not None
        try:
            document_erasure.note(self._store.folder, self._model_sha256, runs)
        except OSError as error:
            logger.warning("event=documents_not_noted reason=%r", error.strerror or str(error))

    def _follow_change(self, change: Change, kept: Collection[str]) -> None:
        """Files first, while none of them can be written, then memory: neither comes back from the other."""
        files = ErasedFiles()
        with contextlib.ExitStack() as held:
            if self._store is not None:
                if change.find is not None:
                    held.enter_context(self._store.banning(change.find))
                try:
                    files = document_erasure.erase(self._store.folder, kept)
                except OSError as error:
                    logger.error("event=documents_not_erased reason=%r", error.strerror or str(error))
            cells = self._orders.follow(change).result()
        if change.find is not None:
            logger.warning(
                "event=documents_erased documents=%d files=%d cached_tokens=%d slots=%d running=%d",
                *(change.erased, files.files, cells.tokens, cells.slots, cells.running),
            )

    @property
    def _opening(self) -> int:
        """How many tokens every document begins with."""
        one, other = (self._encode(Document(id=each, text=each)) for each in "aZ")
        return common_length(tuple(one), tuple(other))
