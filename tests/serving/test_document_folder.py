"""What a folder of documents holds, what is wrong with a file, and when it counts as changed."""

import dataclasses
import errno
import logging
import os
from pathlib import Path

import pytest

from appliance.errors import EnvironmentIncomplete
from appliance.serving import document_folder
from appliance.serving.api import fields
from appliance.serving.document_folder import FolderContent, FolderWatch, read
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


def texts(content: FolderContent | None) -> dict[str, str]:
    assert content is not None
    return {each.id: each.text for each in content.documents}


def test_a_change_is_told_once_when_two_looks_agree_on_it(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("one")
    watch = FolderWatch(tmp_path)
    assert texts(watch.first()) == {"a.md": "one"}
    assert watch.look() is None
    (tmp_path / "a.md").write_text("another")
    assert watch.look() is None
    (tmp_path / "b.md").write_text("new")
    assert texts(watch.look()) == {"a.md": "another"}
    assert texts(watch.look()) == {"a.md": "another", "b.md": "new"}
    assert watch.look() is None
    (tmp_path / "a.md").unlink()
    assert watch.look() is None
    assert texts(watch.look()) == {"b.md": "new"}


def test_a_file_that_keeps_changing_holds_up_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("gone", "moving"):
        (tmp_path / f"{name}.md").write_text("first")
    watch = FolderWatch(tmp_path)
    watch.first()
    (tmp_path / "gone.md").unlink()
    (tmp_path / "new.md").write_text("new")
    told = []
    with caplog.at_level(logging.WARNING):
        for at in range(40):
            (tmp_path / "moving.md").write_text("x" * (at + 1))
            told.append(watch.look())
    assert [texts(each) for each in told if each is not None] == [{"moving.md": "first", "new.md": "new"}]
    assert [record.getMessage().count("moving.md") for record in caplog.records] == [1], "said once"
    assert texts(watch.look()) == {"moving.md": "x" * 40, "new.md": "new"}


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    for suffix in (".txt", ".md", ".jsonl"):
        os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / "device.md").symlink_to("/dev/zero")
    (tmp_path / "good.md").write_text("Good.")
    content = read(tmp_path)
    assert texts(content) == {"good.md": "Good."}
    assert [problem.count("no ordinary file") for problem in content.problems] == [1] * 4


def test_deeply_nested_json_is_a_bad_line(tmp_path: Path) -> None:
    (tmp_path / "all.jsonl").write_text('{"id": ' + "[" * 100_000 + '\n{"id": "x", "text": "1"}\n')
    content = read(tmp_path)
    assert texts(content) == {"x": "1"}
    assert [f"{tmp_path}/all.jsonl:1: " in problem for problem in content.problems] == [True]


def test_a_mark_of_byte_order_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"id": "x", "text": "1"}')
    content = read(tmp_path)
    assert (texts(content), content.problems) == ({"a.md": "one", "x": "1"}, ())


def test_hidden_folders_are_not_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git" / "deep").mkdir(parents=True)
    (tmp_path / ".git" / "deep" / "a.md").write_text("no")
    entered: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (entered.append(str(path)), scandir(path))[1])
    assert read(tmp_path).documents == ()
    assert not any(".git" in path for path in entered)


def refusing(monkeypatch: pytest.MonkeyPatch, name: str, refused: Path) -> None:
    """As root may read everything, the refusal is not the file system's."""
    real = getattr(os, name)

    def call(path: str | Path, *rest: int) -> object:
        if Path(path) == refused:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *rest)

    monkeypatch.setattr(os, name, call)


def test_what_was_read_of_a_folder_that_cannot_be_read_any_more_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "house").mkdir()
    for path in ("a.md", "house/b.md"):
        (tmp_path / path).write_text("one")
    watch = FolderWatch(tmp_path)
    watch.first()
    with monkeypatch.context() as patched:
        refusing(patched, "scandir", tmp_path / "house")
        found = [watch.look() for _ in range(4)]
        told = [content for content in found if content is not None]
        assert [texts(content) for content in told] == [{"a.md": "one", "house/b.md": "one"}], "said once"
        assert ["house: it cannot be read" in problem for problem in told[0].problems] == [True]
    found = [watch.look() for _ in range(3)]
    assert [(texts(content), content.problems) for content in found if content is not None] == [
        ({"a.md": "one", "house/b.md": "one"}, ())
    ]


def test_a_file_that_could_not_be_read_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.md", "b.md"):
        (tmp_path / name).write_text("one")
    watch = FolderWatch(tmp_path)
    watch.first()
    with monkeypatch.context() as patched:
        refusing(patched, "open", tmp_path / "b.md")
        (tmp_path / "b.md").write_text("another")
        told = [content for content in (watch.look() for _ in range(4)) if content is not None]
        assert [texts(content) for content in told] == [{"a.md": "one", "b.md": "one"}], "what was read of it stays"
        assert ["b.md: it cannot be read" in problem for problem in told[0].problems] == [True]
    assert texts(watch.look()) == {"a.md": "one", "b.md": "another"}


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
    assert texts(watch.look()) == {"a.md": "two"}


def test_a_file_written_in_place_with_its_time_put_back_counts_as_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text("one")
    watch = FolderWatch(tmp_path)
    watch.first()
    status = path.stat()
    path.write_text("two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert [watch.look(), texts(watch.look())] == [None, {"a.md": "two"}]


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


def test_a_folder_whose_disk_is_not_mounted_any_more_has_not_lost_its_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Then there is an empty folder, of another file system."""
    (tmp_path / "mount").mkdir()
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.md").write_text("one")
    listed = document_folder._listed

    def on(folder: str, device: int) -> None:
        def look(path: Path) -> document_folder._Listing:
            found = listed(tmp_path / folder)
            stamps = {path / name.name: stamp for name, stamp in found.stamps.items()}
            return dataclasses.replace(found, device=device, stamps=stamps)

        monkeypatch.setattr(document_folder, "_listed", look)

    on("disk", 7)
    (tmp_path / "mount" / "a.md").write_text("one")  # as seen through the mount
    watch = FolderWatch(tmp_path / "mount")
    watch.first()
    on("mount", 8)
    (tmp_path / "mount" / "a.md").unlink()
    with caplog.at_level(logging.WARNING):
        assert [watch.look() for _ in range(4)] == [None] * 4
    assert [record.getMessage().count("is on another disk") for record in caplog.records] == [1]
    on("disk", 9)  # mounted again
    (tmp_path / "mount" / "a.md").write_text("one")
    assert [watch.look() for _ in range(3)] == [None] * 3
    on("mount", 9)
    (tmp_path / "mount" / "a.md").unlink()
    assert [watch.look() for _ in range(2)][-1] == FolderContent(), "an empty folder of the same disk is empty"
