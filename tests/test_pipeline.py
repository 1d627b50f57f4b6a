"""The whole path: made once, unchanged the second time, stopped where something fails, resumable where it was cut off."""

import json
import os
import shutil
import signal
from pathlib import Path

import httpx
import pytest

from appliance import artifacts, promotion
from appliance.training.loop import COMPLETE
from tests import tampered, tiny_recipe
from tests.running import Trained, call, kill_when, run, start

STEPS = ["data", "base", "sft", "dpo", "merge", "gguf", "imatrix", "Q8_0", "Q4_K_M", "verify", "promote"]


@pytest.fixture
def copied(trained: Trained, root: Path) -> Path:
    """A copy of everything that the pipeline made."""
    shutil.copytree(trained.root, root, symlinks=True)
    return root


def states(output: str) -> dict[str, str]:
    return {step["step"]: step["state"] for step in json.loads(output)["steps"]}


def test_every_step_was_made(trained: Trained) -> None:
    assert trained.output["schema"] == 1
    assert {step["step"]: step["state"] for step in trained.output["steps"]} == dict.fromkeys(STEPS, "made") | {
        "promote": "promoted"
    }
    for path in trained.made.values():
        artifacts.check_files(artifacts.load(path))
    assert not list(trained.root.rglob(f"*{artifacts.PARTIAL}"))


def test_chosen_quantization_is_promoted_with_its_settings(trained: Trained) -> None:
    current = promotion.current(trained.root)
    assert current is not None
    assert current.path.name == trained.made["Q8_0"].name
    assert (trained.root / promotion.CURRENT).readlink() == Path("gguf") / trained.made["Q8_0"].name
    assert promotion.serve_settings(current, trained.root)["context_tokens"] == 256


def test_report_names_every_artifact(trained: Trained) -> None:
    report = Path(trained.output["report"]).read_text()
    for path in trained.made.values():
        assert f"{path.parent.name}/{path.name}" in report
    for said in ("## Training", "Preference accuracy", "## Verification", "| Q4_K_M |"):
        assert said in report


def test_second_run_changes_nothing(trained: Trained, copied: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copied.rglob(artifacts.MANIFEST)}
    result = run(copied, "run", trained.recipe, "--json")
    assert result.returncode == 0, result.stderr
    assert states(result.stdout) == dict.fromkeys(STEPS, "unchanged")
    assert {path: path.stat().st_mtime_ns for path in copied.rglob(artifacts.MANIFEST)} == before
    current = promotion.current(copied)
    assert current is not None
    assert current.path.name == trained.made["Q8_0"].name


def test_only_what_depends_on_a_setting_is_made_again(trained: Trained, copied: Path) -> None:
    settings = ("--set", 'quantize.types=["Q8_0", "Q6_K"]', "--set", "quantize.serve=Q6_K", "--set", "serve.slots=3")
    result = run(copied, "run", trained.recipe, "--json", *settings)
    assert result.returncode == 0, result.stderr
    kept = ("data", "base", "sft", "dpo", "merge", "gguf", "imatrix", "Q8_0")
    expected = {**dict.fromkeys(kept, "unchanged"), "Q6_K": "made", "verify": "made", "promote": "promoted"}
    assert states(result.stdout) == expected
    current = promotion.current(copied)
    assert current is not None
    assert current.manifest["config"] == {"type": "Q6_K"}
    assert promotion.serve_settings(current, copied)["slots"] == 3
    assert len(list(copied.glob("report/*verify*/manifest.json"))) == 2  # the older one is kept


def test_dry_run_says_what_would_be_made_and_makes_nothing(trained: Trained, root: Path) -> None:
    result = run(root, "run", trained.recipe, "--dry-run", "--json")
    assert result.returncode == 0, result.stderr
    assert states(result.stdout) == dict.fromkeys(STEPS[:-1], "to make")
    assert not root.exists()
    # Where an adapter was trained on four bits, both ways of merging it are compared on the data set's rows.
    merge = next(line for line in result.stderr.splitlines() if "appliance convert merge" in line)
    assert "--conversations" in merge
    verify = next(line for line in result.stderr.splitlines() if "appliance convert verify" in line)
    assert "--preferences" in verify
    names = [Path(step["artifact"]).name for step in json.loads(result.stdout)["steps"]]
    assert names == [trained.made[step].name for step in STEPS[:-1]]  # and it is what the real run made


def test_limit_that_is_not_kept_ends_with_4_and_promotes_nothing(trained: Trained, copied: Path) -> None:
    for path in (copied / promotion.CURRENT, copied / promotion.RECORD):
        path.unlink()
    result = run(copied, "run", trained.recipe, "--set", "verify.kl_limit=1e-9", "--json")
    assert result.returncode == 4, result.stderr
    assert "lost more than verify.kl_limit = 1e-09 nats" in result.stderr
    assert json.loads(result.stdout)["error"]["code"] == "step_failed"
    assert not (copied / promotion.CURRENT).exists()
    assert not (copied / promotion.RECORD).exists()
    four, report = (copied / trained.made[step].relative_to(trained.root) for step in ("Q4_K_M", "verify"))
    ungated = call("models", "promote", four, "--report", report)
    assert ungated.exit_code == 4  # the report of the run before was on Q8_0
    assert f"held only gguf/{trained.made['Q8_0'].name} to its limit" in ungated.stderr


def test_failed_verification_ends_with_4_and_promotes_nothing(trained: Trained, copied: Path) -> None:
    for path in (*copied.glob("report/*"), copied / promotion.CURRENT, copied / promotion.RECORD):
        path.unlink() if path.is_file() or path.is_symlink() else shutil.rmtree(path)
    # A conversion that went wrong without noticing: the manifest vouches for the wrong file.
    made = copied / trained.made["gguf"].relative_to(trained.root)
    file = next(made.glob("*.gguf"))
    tampered.tensor(file, "blk.1.ffn_down.weight")
    manifest = json.loads((made / artifacts.MANIFEST).read_text())
    manifest["files"][file.name]["sha256"] = artifacts.digest_file(file)
    (made / artifacts.MANIFEST).write_text(json.dumps(manifest))

    result = run(copied, "run", trained.recipe, "--json")
    assert result.returncode == 4, result.stderr
    assert "is not the model that was trained" in result.stderr
    assert "`appliance convert verify` failed (exit 4)" in result.stderr
    assert json.loads(result.stdout)["error"]["code"] == "step_failed"
    assert not (copied / promotion.CURRENT).exists()
    assert not (copied / promotion.RECORD).exists()
    assert not list(copied.glob("report/*verify*/manifest.json"))


def test_ctrl_c_in_training_leaves_a_run_to_resume(trained: Trained, root: Path) -> None:
    trained.copy(root, "data", "base")
    process = start(root, "run", trained.recipe, start_new_session=True)
    assert kill_when(process, lambda: bool(list(root.rglob(COMPLETE))), signal.SIGINT, group=True) == 130
    (partial,) = root.glob("adapter/*.partial")
    assert list(partial.glob(f"checkpoints/*/{COMPLETE}"))
    assert not list(root.glob("adapter/*/manifest.json"))
    assert not (root / promotion.CURRENT).exists()
    resumed = call("train", trained.recipe, "--phase", "sft", "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert "continuing after step" in resumed.stderr


def test_defects_are_fatal_when_asked(root: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe.write(tmp_path / "recipe")
    with (recipe.parent / "sft.jsonl").open("a") as stream:
        stream.write("nonsense\n")
    result = run(root, "run", recipe, "--strict")
    assert result.returncode == 1
    assert "sft.jsonl:7: invalid JSON" in result.stderr
    assert "[2]" not in result.stderr  # no further step
    assert [each for each in root.rglob("*") if each.is_file() and each.suffix != ".lock"] == []


@pytest.mark.parametrize(
    ("base", "code", "said"),
    [
        ("Qwen/Qwen3-0.6B", 3, "Base model 'Qwen/Qwen3-0.6B' is not here; run `appliance pull Qwen/Qwen3-0.6B` first."),
        ("../no/such/folder", 2, "is neither 'starter', nor a folder, nor an id"),
    ],
)
def test_base_that_is_not_there(trained: Trained, root: Path, base: str, code: int, said: str) -> None:
    result = run(root, "run", trained.recipe, "--set", f"base={base}", "--json")
    assert result.returncode == code, result.stderr
    assert said in result.stderr
    assert not list(root.glob("adapter/*"))


def test_base_whose_architecture_cannot_be_converted_is_refused_before_training(
    trained: Trained, root: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(trained.made["base"], base, ignore=shutil.ignore_patterns("manifest.json"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": ["UnheardOfForCausalLM"]}))
    result = run(root, "run", trained.recipe, "--set", f"base={base}")
    assert result.returncode == 1
    assert "Architecture ['UnheardOfForCausalLM'] cannot be converted to GGUF" in result.stderr
    assert not list(root.glob("adapter/*"))


@pytest.mark.slow
def test_local_folder_as_base(trained: Trained, root: Path, tmp_path: Path) -> None:
    base = tmp_path / "my base"
    shutil.copytree(trained.made["base"], base, ignore=shutil.ignore_patterns("manifest.json"))
    result = run(root, "run", trained.recipe, "--set", f"base={base}", "--json")
    assert result.returncode == 0, result.stderr
    assert states(result.stdout)["base"] == "convertible"
    assert promotion.current(root) is not None


def test_served_answer_equals_that_of_transformers(trained: Trained) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained.made["merge"])
    model = AutoModelForCausalLM.from_pretrained(trained.made["merge"], dtype=torch.float32).eval()
    questions = ("Mag mijn hond mee?", "When is the dog open?")  # one learned, one not
    process = start(trained.root, "serve", "--model", trained.full, "--port", "0", "--threads", "1")
    with process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            served = [
                client.post(
                    "/v1/chat/completions",
                    json={
                        "model": "tiny-F16",
                        "messages": [{"role": "user", "content": question}],
                        "temperature": 0,
                        "max_tokens": 24,
                    },
                )
                for question in questions
            ]
        os.kill(process.pid, signal.SIGTERM)
        process.communicate(timeout=60)
    for question, response in zip(questions, served, strict=True):
        assert response.status_code == 200, response.text
        messages = [{"role": "user", "content": question}]
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        with torch.inference_mode():
            whole = model.generate(**rendered, max_new_tokens=24, do_sample=False)
        expected = tokenizer.decode(whole[0, rendered["input_ids"].shape[1] :], skip_special_tokens=True)
        assert response.json()["choices"][0]["message"]["content"] == expected
    assert served[0].json()["choices"][0]["message"]["content"] == "Ja, één hond mag mee."
