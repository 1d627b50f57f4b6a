"""Verification passes what was converted faithfully and fails, with the reason, what was not; a failure leaves no report."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from tests import tampered
from tests.running import Trained, call


def verify(trained: Trained, file: Path, *more: str | Path, merged: Path | None = None) -> Result:
    conversations = trained.made["data"] / "sft.jsonl"
    where = ("--merged", merged or trained.made["merge"], "--conversations", conversations)
    return call("convert", "verify", file, *where, "--prompts", "3", "--answer-tokens", "16", *more)


def test_report_of_the_pipeline(trained: Trained) -> None:
    manifest = trained.manifest("verify")
    results = manifest["results"]
    assert results["tokens"]["conversations"] == 6
    assert results["tokens"]["mismatches"] == 0
    assert results["F16"]["disagreements"] == 0
    assert results["F16"]["steps"] > 20
    assert 0 < results["F16"]["largest_logit_difference"] < 0.05
    assert results["F16"]["largest_logit_difference"] < results["Q4_K_M"]["largest_logit_difference"]
    assert json.loads((trained.made["verify"] / "verify.json").read_text()) == results
    names = {trained.made[step].name for step in ("gguf", "Q8_0", "Q4_K_M", "merge")}
    assert {parent.partition("/")[2] for parent in manifest["parents"]} == names


def test_faithful_copy_passes(trained: Trained, tmp_path: Path, root: Path) -> None:
    file = tampered.copy(trained.full, tmp_path / "copy")
    result = verify(trained, file)
    assert result.exit_code == 0, result.stderr
    assert "0 conversations differ" in result.stderr
    assert len(list(root.glob("report/*/verify.json"))) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda file: tampered.template(file, "<|im_start|>' + message", "<|im_end|>  ' + message"), "first difference at"),
        (
            lambda file: tampered.template(file, "<|im_start|>assistant", "<|im_start|>Assistant"),
            "conversation 1, prompt of its last answer: ",
        ),
        (lambda file: tampered.template(file, "{% endfor %}", "{% endfoo %}"), "The chat template does not compile"),
        (lambda file: tampered.template(file, "message['content']", "message['contort']"), "The chat template refuses"),
        (lambda file: tampered.tensor(file, "blk.1.ffn_down.weight"), "the F16 file's top token differs"),
        (
            lambda file: tampered.number(file, "tokenizer.ggml.eos_token_id", 0),
            "the file's end-of-turn token is 0, the tokenizer's 2",
        ),
    ],
    ids=["template", "generation prompt", "template syntax", "template field", "weights", "end of turn"],
)
def test_tampered_file_fails(
    trained: Trained, tmp_path: Path, root: Path, change: Callable[[Path], None], said: str
) -> None:
    file = tampered.copy(trained.full, tmp_path / "copy")
    change(file)
    result = verify(trained, file)
    assert result.exit_code == 4, result.stderr
    assert "is not the model that was trained" in result.stderr
    assert said in result.stderr
    assert not list(root.rglob("manifest.json"))
    assert not list(root.rglob("verify.json"))


def test_file_of_a_tampered_model_fails_against_the_original(trained: Trained, tmp_path: Path, root: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(trained.made["merge"], model, ignore=shutil.ignore_patterns("manifest.json"))
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("message['content']", "message['content'] + '!'"))
    output = json.loads(call("convert", "gguf", model, "--json").stdout)
    result = verify(trained, Path(output["file"]))
    assert result.exit_code == 4
    assert "6 conversations differ" in result.stderr
    assert not list(root.glob("report/*/manifest.json"))


def test_changed_artifact_is_refused_before_anything_is_loaded(trained: Trained, root: Path) -> None:
    trained.copy(root, "gguf")
    file = next(root.glob("gguf/*/*.gguf"))
    tampered.tensor(file, "blk.0.attn_q.weight")
    result = verify(trained, file)
    assert result.exit_code == 1
    assert "has changed since it was made" in result.stderr


def test_quantized_file_of_another_model_fails(trained: Trained, tmp_path: Path, root: Path) -> None:
    other = tampered.copy(trained.full, tmp_path / "other")
    quantized = Path(json.loads(call("convert", "quantize", other, "--type", "Q8_0", "--json").stdout)["file"])
    result = verify(trained, trained.full, "--quantized", quantized)
    assert result.exit_code == 4
    assert "was made from" in result.stderr
    foreign = verify(trained, trained.full, "--quantized", tampered.copy(quantized, tmp_path / "foreign"))
    assert foreign.exit_code == 4
    assert "has no manifest" in foreign.stderr
    assert not list(root.glob("report/*/manifest.json"))


@pytest.mark.parametrize("keep", [0, 200, 60_000])
def test_truncated_file_is_refused(trained: Trained, tmp_path: Path, root: Path, keep: int) -> None:
    file = tampered.copy(trained.full, tmp_path / "copy")
    file.write_bytes(trained.full.read_bytes()[:keep])
    result = verify(trained, file)
    assert result.exit_code == 1, result.stderr
    assert "cannot be loaded" in result.stderr
    assert not list(root.rglob("manifest.json"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no conversation"),
        ("{}\n", "is no file of conversations"),
        ("nonsense\n", "is no file of conversations"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}\n', "has no user turn"),
    ],
)
def test_unusable_conversations(trained: Trained, tmp_path: Path, root: Path, text: str, said: str) -> None:
    path = tmp_path / "data" / "rows.jsonl"
    path.parent.mkdir()
    path.write_text(text)
    result = call("convert", "verify", trained.full, "--merged", trained.made["merge"], "--conversations", path)
    assert result.exit_code == 1, result.stderr
    assert said in result.stderr
    assert not list(root.rglob("manifest.json"))
