"""An update by stick: a running server takes up what was imported and promoted, and goes back when it is rolled back."""

import json
from pathlib import Path

import pytest

from tests import tiny_artifact
from tests.running import Trained, call
from tests.serving.serving_process import running_server, until


def exported(trained: Trained, step: str, stick: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("APPLIANCE_ARTIFACTS", str(trained.root))
    result = call("models", "export", trained.made[step], "--to", stick, "--json")
    assert result.exit_code == 0, result.stderr
    return Path(json.loads(result.stdout)["file"])


def test_running_server_takes_up_what_the_stick_brings_and_goes_back(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = (tmp_path / f"{name}.appliance" for name in ("small", "large"))
    for file in (small, large):
        tiny_artifact.exported(tmp_path / f"where-{file.stem}-was-made", file, name=file.stem)
    monkeypatch.setenv("APPLIANCE_ARTIFACTS", str(root))
    assert call("models", "import", small, "--promote").exit_code == 0
    with running_server(root=root) as server:

        def model() -> str:
            answer = server.chat(max_tokens=2).json()
            assert answer["usage"]["completion_tokens"] > 0
            return str(answer["model"])

        first = model()
        assert call("models", "import", large, "--promote").exit_code == 0
        until(lambda: model() != first)
        assert call("models", "rollback").exit_code == 0
        until(lambda: model() == first)
        assert server.stop() == 0


def test_server_begins_with_the_model_that_its_image_brings(
    trained: Trained, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = exported(trained, "Q8_0", tmp_path, monkeypatch)
    environ = {"APPLIANCE_FIRST_MODEL": str(file)}
    for is_first in (True, False):
        with running_server(root=root, environ=environ) as server:
            assert server.chat(max_tokens=2).status_code == 200
            assert server.stop() == 0
        assert any("imported gguf/" in line for line in server.errors) == is_first


def test_model_that_an_image_brings_is_held_to_the_trusted_key(
    trained: Trained, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = exported(trained, "Q8_0", tmp_path, monkeypatch)
    (tmp_path / "key.pub").write_text("not looked at: the file is not signed")
    monkeypatch.setenv("APPLIANCE_ARTIFACTS", str(root))
    monkeypatch.setenv("APPLIANCE_TRUSTED_KEY", str(tmp_path / "key.pub"))
    result = call("serve", "--first-model", file)
    assert result.exit_code == 4
    assert "is not signed" in result.stderr
    assert not (root / "current").exists()
