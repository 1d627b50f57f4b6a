"""Verification passes what was converted faithfully and fails, with the reason, what was not; a failure leaves no report."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from appliance.errors import VerificationFailed
from convert import checks
from convert import verify as verifying
from tests import tampered
from tests.running import Trained, call


def verify(trained: Trained, file: Path, *more: str | Path, merged: Path | None = None, rows: Path | None = None) -> Result:
    conversations = rows or trained.made["data"] / "sft.jsonl"
    where = ("--merged", merged or trained.made["merge"], "--conversations", conversations)
    return call("convert", "verify", file, *where, "--prompts", "3", "--answer-tokens", "16", *more)


def test_certificate_of_the_pipeline(trained: Trained) -> None:
    manifest = trained.manifest("verify")
    results = manifest["results"]
    assert results["tokens"]["conversations"] == 14
    assert results["tokens"]["preferences"] == 8  # the chosen and the rejected answer of four triplets
    assert (results["tokens"]["matrices"], results["tokens"]["vectors"], results["tokens"]["not_compared"]) == (15, 9, 0)
    assert not results["tokens"]["combining_marks_left_out"]
    assert results["tokens"]["mismatches"] == 0
    assert results["tokens"]["varied"] == 12  # each with a system message, and with tools
    assert results["F16"]["disagreements"] == 0
    assert results["F16"]["steps"] > 20
    assert 0 < results["F16"]["mean_logit_difference"] < results["F16"]["largest_logit_difference"] < 0.05
    assert results["rows"] == "rows that were trained on"
    gate = {"type": "Q8_0", "kl_limit": 0.1, "passed": True, "rows": "rows that were trained on"}
    assert results["gate"] == {**gate, "model": f"gguf/{trained.made['Q8_0'].name}"}
    full, eight, four = (results["files"][kind] for kind in ("F16", "Q8_0", "Q4_K_M"))
    assert full["size_bytes"] > eight["size_bytes"] > four["size_bytes"]
    assert all(each["fits"] and each["decode_tokens_per_second"] > 0 for each in (full, eight, four))
    assert eight["languages"].keys() == {"nl", "en"}
    for language in ("nl", "en"):
        assert 0 < eight["languages"][language]["kl_mean"] < four["languages"][language]["kl_mean"]
        assert eight["languages"][language]["same_top_ratio"] > 0.95
        assert eight["languages"][language]["perplexity_f16"] == four["languages"][language]["perplexity_f16"]
    worst = [each["kl"] for each in four["worst"]]
    assert len(worst) == 10
    assert worst == sorted(worst, reverse=True)
    assert json.loads((trained.made["verify"] / "certificate.json").read_text()) == results
    names = {trained.made[step].name for step in ("gguf", "Q8_0", "Q4_K_M", "merge")}
    assert {parent.partition("/")[2] for parent in manifest["parents"]} == names


def test_page_and_show_tell_it_in_words(trained: Trained, root: Path) -> None:
    trained.copy(root, "gguf", "Q8_0", "Q4_K_M", "verify")
    shown = call("models", "show", str(root / trained.made["Q4_K_M"].relative_to(trained.root)))
    assert shown.exit_code == 0, shown.stderr
    page = (trained.made["verify"] / "certificate.md").read_text()
    assert page in shown.stdout
    for said in ("| Q4_K_M | nl |", "| Q8_0 | en |", "## Where Q4_K_M differs most", "Q8_0 keeps to the limit of 0.1 nats"):
        assert said in page
    as_json = json.loads(call("models", "show", trained.made["Q4_K_M"].name, "--json").stdout)
    assert as_json["certificate"]["files"]["Q4_K_M"]["languages"]["nl"]["kl_mean"] > 0


def test_limit_of_the_served_file(trained: Trained, root: Path) -> None:
    (eight,) = trained.made["Q8_0"].glob("*.gguf")
    (four,) = trained.made["Q4_K_M"].glob("*.gguf")
    files = ("--quantized", eight, "--quantized", four)
    result = verify(trained, trained.full, *files, "--gate", "Q4_K_M", "--kl-limit", "1e-6")
    assert result.exit_code == 4
    assert "lost more than verify.kl_limit = 1e-06 nats" in result.stderr
    assert not list(root.rglob("certificate.json"))
    assert verify(trained, trained.full, *files, "--gate", "Q4_K_M", "--memory-mib", "64").exit_code == 4
    assert verify(trained, trained.full, *files, "--gate", "Q5_K_M").exit_code == 2
    passed = verify(trained, trained.full, *files, "--gate", "Q8_0", "--kl-limit", "0.5")
    assert passed.exit_code == 0, passed.stderr


@pytest.mark.usefixtures("root")
def test_files_of_one_type_have_names_of_their_own(trained: Trained, tmp_path: Path) -> None:
    """What was measured for a file makes the name; of two that would be called alike, neither is passed over."""
    (weighed,) = trained.made["Q4_K_M"].glob("*.gguf")
    plain = Path(json.loads(call("convert", "quantize", trained.full, "--type", "Q4_K_M", "--json").stdout)["file"])
    other = tmp_path / "copy" / plain.parent.name / plain.name
    shutil.copytree(plain.parent, other.parent)
    assert verifying._by_type([plain, weighed]) == {"Q4_K_M plain": plain, "Q4_K_M": weighed}
    assert verifying._by_type([plain]) == {"Q4_K_M": plain}
    result = verify(trained, trained.full, "--quantized", weighed, "--quantized", plain, "--quantized", other)
    assert result.exit_code == 2
    assert "would both be called Q4_K_M plain" in " ".join(result.stderr.split())


def test_gate_lets_nothing_through_that_was_not_measured() -> None:
    cost = {"fits": True, "size_bytes": 1, "fit_notes": ""}
    results = {"rows": "held-out rows", "left_out": 3, "files": {"F16": cost, "Q8_0": {**cost, "languages": {}}}}
    with pytest.raises(VerificationFailed, match=r"none of the held-out rows .* \(3 were left out\)"):
        verifying._judge("Q8_0", results, 0.1)
    results["files"] = {"Q8_0": {**cost, "languages": {"nl": {"kl_mean": float("nan")}, "en": {"kl_mean": 0.01}}}}
    with pytest.raises(VerificationFailed, match=r"lost more than .* in nl nan"):
        verifying._judge("Q8_0", results, 0.1)
    assert verifying._judge("F16", {**results, "files": {"F16": cost}}, 0.1)["passed"]
    with pytest.raises(VerificationFailed, match="does not fit"):
        verifying._judge("F16", {**results, "files": {"F16": {**cost, "fits": False}}}, 0.1)


@pytest.mark.usefixtures("root")
def test_heldout_rows_are_measured_on(trained: Trained, tmp_path: Path) -> None:
    path = tmp_path / "data" / "heldout.jsonl"
    path.parent.mkdir()
    row = {
        "messages": [{"role": "user", "content": "Is de balie open?"}, {"role": "assistant", "content": "Ja, tot vier uur."}]
    }
    path.write_text(json.dumps(row) + "\n")
    (eight,) = trained.made["Q8_0"].glob("*.gguf")
    result = verify(trained, trained.full, "--quantized", eight, "--heldout", path, "--language", "nl", "--json")
    assert result.exit_code == 0, result.stderr
    results = json.loads(result.stdout)["results"]
    assert (results["rows"], results["left_out"]) == ("held-out rows", 0)
    assert (results["tokens"]["conversations"], results["tokens"]["heldout"]) == (7, 1)
    assert results["files"]["Q8_0"]["languages"].keys() == {"nl"}


@pytest.mark.usefixtures("root")
def test_heldout_rows_and_preferences_become_the_same_tokens(trained: Trained, tmp_path: Path) -> None:
    """What is split otherwise in them is found there too."""
    path = tmp_path / "data" / "rows.jsonl"
    path.parent.mkdir()
    odd = "Until four o'clock."
    file = tampered.copy(trained.full, tmp_path / "copy")
    tampered.text(file, "tokenizer.ggml.pre", "qwen2", "gpt-2")
    prompt = [{"role": "user", "content": "Is it?"}]
    for flag, row in (
        ("--heldout", {"messages": [*prompt, {"role": "assistant", "content": odd}]}),
        ("--preferences", {"prompt": prompt, "chosen": "Yes.", "rejected": odd}),
    ):
        path.write_text(json.dumps(row) + "\n")
        result = verify(trained, file, flag, path)
        assert result.exit_code == 4
        said = "held-out conversation 1" if flag == "--heldout" else "preference answer 2"
        assert f"{said}: " in result.stderr
    path.write_text("{}\n")
    assert "is no file of preferences" in verify(trained, file, "--preferences", path).stderr


@pytest.mark.usefixtures("root")
def test_file_with_an_importance_matrix_is_held_against_the_plain_one(trained: Trained) -> None:
    (weighed,) = trained.made["Q4_K_M"].glob("*.gguf")
    plain = Path(json.loads(call("convert", "quantize", trained.full, "--type", "Q4_K_M", "--json").stdout)["file"])
    files = ("--quantized", weighed, "--quantized", plain)
    result = verify(trained, trained.full, *files, "--language", "nl", "--language", "en", "--json")
    assert result.exit_code == 0, result.stderr
    output = json.loads(result.stdout)
    measured = output["results"]["files"]
    found = measured["Q4_K_M"]["against_plain"]
    assert found.keys() == {"nl", "en"}
    assert "against_plain" not in measured["Q4_K_M plain"]
    for language, each in found.items():
        means = [measured[kind]["languages"][language]["kl_mean"] for kind in ("Q4_K_M", "Q4_K_M plain")]
        assert each["kl_difference"] == pytest.approx(means[0] - means[1], abs=1e-7)
        assert each["conversations"] == 3
        assert each["error"] > 0
    page = (Path(output["artifact"]) / "certificate.md").read_text()
    assert "The importance matrix of Q4_K_M makes" in page


def test_faithful_copy_passes(trained: Trained, tmp_path: Path, root: Path) -> None:
    file = tampered.copy(trained.full, tmp_path / "copy")
    result = verify(trained, file)
    assert result.exit_code == 0, result.stderr
    assert "0 conversations differ" in result.stderr
    assert len(list(root.glob("report/*/certificate.json"))) == 1


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
        (lambda file: tampered.scaled(file, "blk.1.ffn_down.weight", 1.05), "of their spread on average"),
        (lambda file: tampered.scaled(file, "blk.0.attn_q.weight", 1.003), "blk.0.attn_q.weight is not the model's: its"),
        (
            lambda file: tampered.scaled(file, "blk.0.attn_norm.weight", 1.003),
            "blk.0.attn_norm.weight is not the model's: its",
        ),
        (lambda file: tampered.token(file, "<|im_start|>"), "the token '<|im_start|>' has the id"),
        (
            lambda file: tampered.number(file, "tokenizer.ggml.eos_token_id", 0),
            "the file's end-of-turn token is 0, the tokenizer's 2",
        ),
    ],
    ids=[
        *(
            "template",
            "generation prompt",
            "template syntax",
            "template field",
            "weights",
            "weights a little",
            "weights a hair",
            "norm a hair",
            "special token",
        ),
        "end of turn",
    ],
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
    assert not list(root.rglob("certificate.json"))


@pytest.mark.parametrize(
    ("check", "change"),
    [
        ("compare_tokens", lambda file: tampered.template(file, "<|im_start|>assistant", "<|im_start|>Assistant")),
        ("compare_vocabulary", lambda file: tampered.number(file, "tokenizer.ggml.eos_token_id", 0)),
        ("compare_texts", lambda file: tampered.control(file, "Ġkat")),
        ("compare_torture", lambda file: tampered.text(file, "tokenizer.ggml.pre", "qwen2", "gpt-2")),
        ("compare_weights", lambda file: tampered.scaled(file, "blk.1.ffn_down.weight", 1.005)),
        ("compare_weights", lambda file: tampered.scaled(file, "blk.1.ffn_norm.weight", 1.003)),
        ("judge_paths", lambda file: tampered.turned(file, "blk.1.ffn_down.weight")),
    ],
    ids=["tokens", "vocabulary", "texts", "torture", "weights", "norms", "paths"],
)
def test_no_check_is_idle(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: str, change: Callable[[Path], None]
) -> None:
    """Without that one check, the broken file would pass: no other finds it."""
    monkeypatch.setenv("APPLIANCE_ARTIFACTS", str(tmp_path / "artifacts"))
    # Without the one conversation that shows another pre-tokenizer by itself ("o'clock").
    rows = tmp_path / "data" / "sft.jsonl"
    rows.parent.mkdir()
    lines = (trained.made["data"] / "sft.jsonl").read_text().splitlines(keepends=True)
    rows.write_text("".join(line for line in lines if "o'clock" not in line))
    file = tampered.copy(trained.full, tmp_path / "copy")
    change(file)
    assert verify(trained, file, rows=rows).exit_code == 4
    nothing = ([], dict.fromkeys(("matrices", "vectors", "not_compared"), 0)) if check == "compare_weights" else []
    monkeypatch.setattr(checks, check, lambda *_: nothing)
    passed = verify(trained, file, rows=rows)
    assert passed.exit_code == 0, passed.stderr


def test_answer_that_never_ends_is_found_by_one_check_alone(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training closed answers with words that end no generation: file and model agree in everything else."""
    model = tmp_path / "model"
    shutil.copytree(trained.made["merge"], model, ignore=shutil.ignore_patterns("manifest.json"))
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("'<|im_end|>'", "'<|im_stop|>'"))
    file = Path(json.loads(call("convert", "gguf", model, "--json").stdout)["file"])
    result = verify(trained, file, merged=model)
    assert result.exit_code == 4, result.stderr
    assert "which ends no generation in the file: it would write on and on" in " ".join(result.stderr.split())
    monkeypatch.setattr(checks, "compare_end_of_turn", lambda *_: [])
    passed = verify(trained, file, merged=model)
    assert passed.exit_code == 0, passed.stderr


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
