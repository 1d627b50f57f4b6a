"""The operator's documents in an engine's process: made into tokens, read ahead where that is of use, erased when removed.

In a thread of its own, one change after the other: tokens of many documents take seconds, and files to be deleted wait for
a disk. What a disk refuses is tried again.
"""

import concurrent.futures
import contextlib
import dataclasses
import logging
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence

from appliance.errors import PromptTooLong
from appliance.serving import document_erasure, passages
from appliance.serving.cache import common_length
from appliance.serving.document_erasure import ErasedFiles
from appliance.serving.document_orders import DocumentOrders, ErasedCells
from appliance.serving.reading_ahead import Change
from appliance.serving.requests import Document
from appliance.serving.runs import Finder, Run, finder, packed
from appliance.serving.snapshots import Prefix, SnapshotStore
from appliance.serving.wire import Documents

RETRY_SECONDS = 30.0

logger = logging.getLogger("appliance.serving")

Named = Mapping[str, Document]  # by digest


class KeptDocuments:
    """`encode` makes a document's tokens, as in prompts; it raises `PromptTooLong` for one that no prompt holds."""

    def __init__(
        self,
        orders: DocumentOrders,
        encode: Callable[[Document], Sequence[int]],
        store: SnapshotStore | None,
        model_sha256: str,
        *,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self._orders = orders
        self._encode = encode
        self._store = store
        self._model_sha256 = model_sha256
        self._retry_seconds = retry_seconds
        self._runs: dict[str, Run] = {}  # by digest: what there is now
        self._noted: set[str] = set()  # those of which the list on disk tells: they may be read
        self._too_long: set[str] = set()
        self._unerased: dict[str, Run] = {}  # removed, and perhaps still in files
        self._untold = 0  # erased since the last order
        self._ordered: Change | None = None
        self._said: set[str] = set()  # what keeps failing
        self._is_told = False  # that nothing is read ahead
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "documents")
        self._timer: threading.Timer | None = None

    def keep(self, asked: Documents) -> None:
        """Follows what is in the folder now; returns at once."""
        self._thread.submit(self._follow, asked)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._timer is not None:
            self._timer.cancel()

    def _follow(self, asked: Documents) -> None:
        if self._timer is not None:
            self._timer.cancel()
        try:
            is_done = self._keep(asked)
        except concurrent.futures.CancelledError:
            logger.warning("event=documents_not_followed reason='the engine ends'")
        except Exception as error:  # its message may hold text of a document
            where = "".join(traceback.format_tb(error.__traceback__))
            logger.error("event=documents_not_followed type=%s\n%s", type(error).__name__, where)
        else:
            if not is_done:
                self._timer = threading.Timer(self._retry_seconds, self._retry, [asked])
                self._timer.daemon = True
                self._timer.start()

    def _retry(self, asked: Documents) -> None:
        with contextlib.suppress(RuntimeError):  # the engine ends
            self.keep(asked)

    def _keep(self, asked: Documents) -> bool:
        """Erases what was removed, then reads what is new; False when something is to be tried again."""
        names = {document_erasure.digest(each): each for each in asked.documents}
        listed, is_listed = self._listed()
        known = {**listed, **self._unerased, **self._runs}
        removed = {name: run for name, run in known.items() if name not in names}
        self._runs = {name: run for name, run in self._runs.items() if name in names}
        self._noted &= names.keys()
        self._too_long &= names.keys()
        is_erased = self._erase(asked, names, removed)
        self._add(names, {} if self._is_ahead(asked) else listed)
        is_noted = is_listed and self._note()
        self._order(self._change(asked, names))
        return is_erased and is_noted

    def _listed(self) -> tuple[document_erasure.Documents, bool]:
        """What the list on disk tells, and whether it could be read."""
        if self._store is None:
            return {}, True
        try:
            return document_erasure.noted(self._store.folder, self._model_sha256), True
        except OSError as error:
            self._say("note", error)
            return {}, False

    def _erase(self, asked: Documents, names: Named, removed: Mapping[str, Run]) -> bool:
        """Files first, while none of them can be written, then memory: neither comes back from the other."""
        find = finder(removed.values(), self._opening) if removed.keys() - self._unerased.keys() else None
        files, cells, is_done = ErasedFiles(), ErasedCells(), True
        with contextlib.ExitStack() as held:
            if self._store is not None:
                if find is not None:
                    held.enter_context(self._store.banning(find))
                try:
                    files = document_erasure.erase(self._store.folder, names, {self._model_sha256: removed.values()})
                except OSError as error:
                    is_done = False
                    self._say("erase", error)
                else:
                    self._said.discard("erase")
            self._unerased = {} if is_done else dict(removed)
            self._untold += len(removed) if is_done else 0
            if find is not None:
                cells = self._order(self._change(asked, names, find))
        if removed and is_done:
            logger.warning(
                "event=documents_erased documents=%d files=%d cached_tokens=%d slots=%d running=%d",
                *(len(removed), files.files, cells.tokens, cells.slots, cells.running),
            )
        return is_done

    def _add(self, names: Named, listed: document_erasure.Documents) -> None:
        """Makes tokens of what is new; those that are listed are taken as they are."""
        for name in names.keys() - self._runs.keys() - self._too_long:
            try:
                self._runs[name] = listed[name] if name in listed else packed(self._encode(names[name]))
            except PromptTooLong as error:
                self._too_long.add(name)
                logger.warning("event=document_refused id=%r reason=%r", names[name].id, str(error))

    def _note(self) -> bool:
        """Before the first of their files is written, so that it will be found again. Until then they are not read."""
        if self._store is not None:
            try:
                document_erasure.note(self._store.folder, self._model_sha256, self._runs)
            except OSError as error:
                self._say("note", error)
                return False
        self._said.discard("note")
        self._noted = set(self._runs)
        return True

    def _order(self, change: Change) -> ErasedCells:
        """Carries it out, unless it is what was ordered last, as when something is tried again."""
        if change == self._ordered:
            return ErasedCells()
        cells = self._orders.follow(change).result()
        self._ordered = dataclasses.replace(change, find=None, erased=0)
        return cells

    def _change(self, asked: Documents, names: Named, find: Finder | None = None) -> Change:
        readable: Mapping[Prefix, str] = {}
        unplaced: tuple[int, ...] = ()
        if self._is_ahead(asked):
            readable, unplaced = self._readable(names)
        elif asked.is_read_ahead and names and not self._is_told:
            self._is_told = True
            reason = "they are read in their place here"
            logger.warning("event=documents_not_read_ahead documents=%d reason=%r", len(names), reason)
        refused = asked.refused + len(self._too_long)
        erased, self._untold = self._untold, 0
        return Change(readable, find, refused, erased, unplaced=unplaced, unerased=len(self._unerased))

    def _readable(self, names: Named) -> tuple[Mapping[Prefix, str], tuple[int, ...]]:
        """Those that may find place, and the tokens of the others: as prefixes they take ten times the memory."""
        found: dict[Prefix, str] = {}
        unplaced = []
        left = self._orders.most_tokens
        for name, document in names.items():
            if name not in self._noted:
                continue
            run = self._runs[name]
            if len(run) <= left:
                left -= len(run)
                found[Prefix(passages.alone(run))] = document.id
            else:
                unplaced.append(len(run))
        return found, tuple(unplaced)

    def _is_ahead(self, asked: Documents) -> bool:
        return asked.is_read_ahead and self._orders.is_stitching

    def _say(self, task: str, error: OSError) -> None:
        """Once, until it has succeeded."""
        if task not in self._said:
            self._said.add(task)
            reason = error.strerror or str(error)
            logger.error("event=documents_unfinished task=%s reason=%r retry_seconds=%g", task, reason, self._retry_seconds)

    @property
    def _opening(self) -> int:
        """How many tokens every document begins with."""
        one, other = (self._encode(Document(id=each, text=each)) for each in "aZ")
        return common_length(tuple(one), tuple(other))
