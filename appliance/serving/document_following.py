"""Follows the operator's folder of documents while the server runs, and erases at its start what was removed meanwhile."""

import asyncio
import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

from appliance.serving import document_erasure, wire
from appliance.serving.document_folder import FolderContent, FolderWatch

LOOK_SECONDS = 2.0

logger = logging.getLogger("appliance.serving")


class Keeper(Protocol):
    """Who has engines."""

    @property
    def document_folder(self) -> Path | None: ...

    def keep(self, documents: wire.Documents) -> None: ...


class Following:
    """`start` looks for the first time; `follow` then looks again and again. `say` tells a person what was not taken."""

    def __init__(self, folder: Path | None, say: Callable[[str], None], *, look_seconds: float = LOOK_SECONDS) -> None:
        self._folder = folder
        self._say = say
        self._look_seconds = look_seconds
        self._watch: FolderWatch | None = None
        self._untold: FolderContent | None = None  # nobody could be told yet

    def start(self, snapshot_folders: Collection[Path]) -> wire.Documents:
        """What is in the folder; what is no more is erased from these. Raises `EnvironmentIncomplete` without the folder."""
        content = FolderContent()
        if self._folder is not None:
            self._watch = FolderWatch(self._folder)
            content = self._watch.first()
        for problem in content.problems:
            self._say(f"warning: {problem}")
        kept = {document_erasure.digest(each) for each in content.documents}
        for folder in snapshot_folders:
            try:
                erased = document_erasure.erase(folder, kept)
            except OSError as error:
                self._say(f"warning: removed documents may be left in {folder}: {error.strerror}, {error.filename}")
                continue
            if erased.documents:
                self._say(f"{erased.documents} documents were removed or edited: {erased.files} files of theirs erased")
        return _message(content)

    async def follow(self, keeper: Keeper) -> None:
        """Tells of each change, until it is cancelled."""
        while True:
            await asyncio.sleep(self._look_seconds)
            try:
                await self._follow(keeper)
            except Exception:
                logger.exception("event=document_folder_failed")  # the next round tries again

    async def _follow(self, keeper: Keeper) -> None:
        if keeper.document_folder != self._folder:  # another model was promoted, with other settings
            if keeper.document_folder is None:
                keeper.keep(wire.Documents())
            self._folder = keeper.document_folder
            self._watch = None if self._folder is None else FolderWatch(self._folder)
            self._untold = None
        if self._watch is None:
            return
        if (content := await asyncio.to_thread(self._watch.look)) is not None:
            self._untold = content
            for problem in content.problems:
                logger.warning("event=document_refused reason=%r", problem)
        if self._untold is not None:
            keeper.keep(_message(self._untold))
            self._untold = None


def _message(content: FolderContent) -> wire.Documents:
    return wire.Documents(documents=content.documents, refused=len(content.problems))
