"""What the converter would misread is written anew: each of these folders is converted wrongly, or not at all, as it is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convert import checkpoint, converter, pre_tokenizer, staged_model, to_gguf
from convert.checkpoint import Checkpoint
from tests.convert import families, quick_converter
from tests.convert.families import FAMILIES
from tests.running import call


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_converter.install(monkeypatch)


def saved_again(folder: Path) -> None:
    """The tokenizer as transformers 5 saves it, and nothing of what was there."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.model").unlink(missing_ok=True)


def without_settings(folder: Path) -> None:
    """Added tokens are in tokenizer.json alone."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["added_tokens_decoder"]
    path.write_text(json.dumps(settings))


def unchanged(_folder: Path) -> None: ...


def as_it_is(model: Checkpoint, tokenizer: Any) -> str | None:
    """What is wrong with the file that llama.cpp's converter makes of the folder itself."""
    target = model.folder / "theirs.gguf"
    name = next(iter(pre_tokenizer.candidates(pre_tokenizer.table(tokenizer))), None)
    converter.run(to_gguf.SCRIPT, model.folder, [str(model.folder), "--outfile", str(target)], target, name)
    return pre_tokenizer.difference(target, tokenizer)


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("Falcon", unchanged, "was not converted"),
        ("Llama 2", unchanged, "first difference"),  # transformers 5 puts a space before the first text alone
        ("Llama 2", saved_again, "first difference"),
        ("Mistral", saved_again, "first difference"),
        ("Gemma 2", saved_again, "was not converted"),
        ("Gemma 2", without_settings, "first difference"),
        ("Phi-3", unchanged, "first difference"),  # its name does not say Phi-3
        ("Phi-3", saved_again, "was not converted"),
        ("Phi-4", saved_again, "was not converted"),
    ],
)
def test_misread_folder(family: str, change: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    folder = families.write_model(FAMILIES[family], tmp_path / "base")
    change(folder)
    model, tokenizer = checkpoint.read(folder), pre_tokenizer.load(folder)
    try:
        problem = as_it_is(model, tokenizer)
    except Exception as error:
        problem = str(error)
    assert said in str(problem)
    before = sorted(each.name for each in folder.iterdir())
    to_gguf.convert(model, tokenizer, tmp_path / "ours.gguf", "f16")
    assert pre_tokenizer.difference(tmp_path / "ours.gguf", tokenizer) is None
    assert sorted(each.name for each in folder.iterdir()) == before


def test_tokenizer_of_another_type_is_refused_in_words(root: Path, tmp_path: Path) -> None:
    """Unigram: without its tokenizer.model."""
    folder = families.write_model(FAMILIES["Mistral"], tmp_path / "base")
    (folder / "tokenizer.model").unlink()
    table = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = sorted(table["model"]["vocab"], key=table["model"]["vocab"].__getitem__)
    scored = [[text, -float(place)] for place, text in enumerate(vocabulary)]
    table["model"] = {"type": "Unigram", "unk_id": vocabulary.index("<unk>"), "vocab": scored, "byte_fallback": True}
    (folder / "tokenizer.json").write_text(json.dumps(table))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    result = call("convert", "gguf", folder)
    assert result.exit_code == 1, result.stderr
    assert "has no tokenizer.model, and its tokenizer.json is of type Unigram" in result.stderr
    assert not list(root.rglob("*.gguf"))


def test_nothing_is_written_anew_without_a_reason(tmp_path: Path) -> None:
    folder = families.write_model(FAMILIES["Qwen3"], tmp_path / "base")
    with staged_model.staged(checkpoint.read(folder), pre_tokenizer.load(folder)) as staged:
        assert staged.name == "base"
        assert {each.name for each in staged.iterdir()} == {each.name for each in folder.iterdir()}
        assert all(each.is_symlink() for each in staged.iterdir())
    assert not staged.exists()
