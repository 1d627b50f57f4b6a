"""What a folder of documents holds, what is wrong with a file, and when it counts as changed."""

import logging
import os
from pathlib import Path

import pytest

from appliance.errors import EnvironmentIncomplete
from appliance.serving import document_folder
from appliance.serving.api import fields
from appliance.serving.document_folder import FolderWatch, read
from appliance.serving.requests import Document


def test_files_and_lines_are_documents(tmp_path: Path) -> None:
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / "beds.md").write_text("Beds at six.")
    (tmp_path / "food.TXT").write_text("Soupe à midi.", encoding="utf-8")
    (tmp_path / "all.jsonl").write_text('{"id": "desk", "text": "Open.", "page": 3}\n\n{"id": "doors", "text": "Shut."}\n')
    (tmp_path / "picture.png").write_bytes(b"\xff")
    (tmp_path / ".hidden.md").write_text("no")
    content = read(tmp_path)
    assert content.problems == ()
    assert content.documents == (
        Document(id="desk", text="Open."),
        Document(id="doors", text="Shut."),
        Document(id="food.TXT", text="Soupe à midi."),
        Document(id="house/beds.md", text="Beds at six."),
    )


def test_a_bad_file_is_said_with_its_line_and_the_others_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_folder, "MOST_BYTES", 1000)
    (tmp_path / "a-latin.md").write_bytes(b"one\ntwo \xe9\n")
    (tmp_path / "b-empty.md").write_text(" \n")
    (tmp_path / "c-good.md").write_text("Good.")
    (tmp_path / "d.jsonl").write_text('{"id": "x", "text": "1"}\nnonsense\n{"id": "y"}\n[]\n{"id": "x", "text": "2"}\n')
    (tmp_path / "e.jsonl").write_text('{"id": "' + "i" * 513 + '", "text": "1"}\n{"id": "", "text": "1"}\n')
    (tmp_path / "f.jsonl").write_text('{"id": "s", "text": "\\ud800"}\n')
    (tmp_path / "g-large.md").write_text("x" * 1000)
    (tmp_path / "h-gone.md").symlink_to(tmp_path / "nowhere.md")
    content = read(tmp_path)
    assert [each.id for each in content.documents] == ["c-good.md", "x"]
    assert content.documents[1].text == "1"
    told = [problem.replace(f"{tmp_path}/", "") for problem in content.problems]
    for beginning, said in (
        ("a-latin.md:2: ", "UTF-8 at byte 8"),
        ("b-empty.md: ", "empty"),
        ("d.jsonl:2: ", "not JSON"),
        ("d.jsonl:3: ", '{"id": "…", "text": "…"}'),
        ("d.jsonl:4: ", '{"id": "…", "text": "…"}'),
        ("d.jsonl:5: ", "d.jsonl:1 too"),
        ("e.jsonl:1: ", "513 characters; it must have 1 to 512"),
        ("e.jsonl:2: ", "0 characters"),
        ("f.jsonl:1: ", "no text"),
        ("g-large.md: ", "1000 bytes together"),
        ("h-gone.md: ", "cannot be read"),
    ):
        assert any(each.startswith(beginning) and said in each for each in told), (beginning, told)
    assert len(told) == 11


def test_ids_may_be_as_long_as_in_requests() -> None:
    assert document_folder.MAX_ID_CHARACTERS == fields.MAX_NAME_CHARACTERS


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_what_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentIncomplete, match=r"serve\.document_folder.*name a folder"):
        FolderWatch(tmp_path / name).first()


def test_a_change_is_told_once_nothing_changes_any_more(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("one")
    watch = FolderWatch(tmp_path)
    assert [each.text for each in watch.first().documents] == ["one"]
    assert watch.look() is None
    (tmp_path / "a.md").write_text("another")
    assert watch.look() is None
    (tmp_path / "b.md").write_text("new")
    assert watch.look() is None
    content = watch.look()
    assert content is not None
    assert [each.text for each in content.documents] == ["another", "new"]
    assert watch.look() is None
    (tmp_path / "a.md").unlink()
    watch.look()
    content = watch.look()
    assert content is not None
    assert [each.id for each in content.documents] == ["b.md"]


def test_a_file_of_the_same_length_and_time_that_is_another_counts_as_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text("one")
    watch = FolderWatch(tmp_path)
    watch.first()
    status = path.stat()
    (tmp_path / "new").write_text("two")
    (tmp_path / "new").replace(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert watch.look() is None
    assert watch.look() is not None


def test_a_folder_that_is_gone_has_not_lost_its_documents(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "mounted"
    folder.mkdir()
    (folder / "a.md").write_text("one")
    watch = FolderWatch(folder)
    watch.first()
    folder.rename(tmp_path / "elsewhere")
    with caplog.at_level(logging.WARNING):
        assert [watch.look() for _ in range(4)] == [None] * 4
    assert len(caplog.records) == 1
    (tmp_path / "elsewhere").rename(folder)
    assert [watch.look() for _ in range(3)] == [None] * 3
