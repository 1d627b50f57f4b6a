"""What must stop a model on its way to being served: changed inputs, another file's report."""

from pathlib import Path

from tests.running import Trained, call


def test_changed_input_is_refused(trained: Trained, root: Path) -> None:
    trained.copy(root, "merged" if "merged" in trained.made else "merge")
    folder = next((root / "merged").iterdir())
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    result = call("convert", "gguf", folder)
    assert result.exit_code == 1
    assert "has changed since it was made" in result.stderr
    assert not list(root.glob("gguf/*/manifest.json"))


def test_quantized_file_of_another_model_is_not_verified(trained: Trained, root: Path, tmp_path: Path) -> None:
    trained.copy(root, "data", "merge", "gguf", "Q8_0")
    full = next((root / trained.made["gguf"].relative_to(trained.root)).glob("*.gguf"))
    other = tmp_path / "foreign-Q8_0.gguf"
    other.write_bytes(full.read_bytes())
    merged, data = (root / trained.made[step].relative_to(trained.root) for step in ("merge", "data"))
    files = ("--merged", merged, "--conversations", data / "sft.jsonl", "--quantized", other)
    result = call("convert", "verify", full, *files)
    assert result.exit_code == 4
    assert "nothing says what it was made from" in result.stderr
