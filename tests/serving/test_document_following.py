"""Following a folder of documents goes on, whatever goes wrong in one round."""

import asyncio
import logging
from pathlib import Path

import pytest

from appliance.serving import wire
from appliance.serving.document_following import Following


class FailingKeeper:
    """Fails when it is told for the first time."""

    def __init__(self, folder: Path | None) -> None:
        self.document_folder = folder
        self.told: list[list[str]] = []
        self.has_failed = False

    def keep(self, documents: wire.Documents) -> None:
        if not self.has_failed:
            self.has_failed = True
            raise RuntimeError("no")
        self.told.append([each.id for each in documents.documents])


@pytest.mark.parametrize("is_promoted", [False, True])
def test_who_could_not_be_told_is_told_again(tmp_path: Path, is_promoted: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Also when another model was promoted that has no folder."""
    (tmp_path / "a.md").write_text("one")
    keeper = FailingKeeper(None if is_promoted else tmp_path)
    following = Following(tmp_path, lambda _: None, look_seconds=0.001)
    following.start(())
    if not is_promoted:
        (tmp_path / "b.md").write_text("two")

    async def follow() -> None:
        task = asyncio.create_task(following.follow(keeper))
        while not keeper.told and not task.done():
            await asyncio.sleep(0.001)
        task.cancel()

    with caplog.at_level(logging.ERROR):
        asyncio.run(asyncio.wait_for(follow(), 20))
    assert keeper.told == [[] if is_promoted else ["a.md", "b.md"]]
    assert caplog.text.count("event=document_folder_failed") == 1
