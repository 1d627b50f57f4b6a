"""Which tensors lose most: every figure is that of a file, and bytes go where they save most."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest

from appliance import artifacts
from appliance.errors import ModelFileError
from convert import conversations, divergence, quantizer, sensitivity
from convert.divergence import Answer
from convert.gguf_model import GgufModel
from convert.sensitivity import Role, Sensitivity
from tests.running import Trained, call, run

ALIGNMENT = 32  # bytes, of each tensor in a file


def measured(trained: Trained, *more: str | Path) -> dict[str, Any]:
    rows = trained.made["data"] / "sft.jsonl"
    flags = ("--merged", trained.made["merge"], "--conversations", rows, "--language", "nl", "--language", "en")
    result = call("convert", "sensitivity", trained.full, *flags, "--tokens", "128", *more, "--json")
    assert result.exit_code == 0, result.stderr
    output: dict[str, Any] = json.loads(result.stdout)
    return output


def tensor_types(file: Path) -> dict[str, str]:
    return {each.name: each.tensor_type.name for each in gguf.GGUFReader(file).tensors}


@pytest.mark.usefixtures("root")
def test_every_figure_is_that_of_a_file(trained: Trained, tmp_path: Path) -> None:
    output = measured(trained, "--type", "Q4_0")
    found = sensitivity.read(Path(output["file"]))
    (embedding,) = (each for each in found.roles if each.role == "token_embd")
    assert {each.role for each in found.roles} >= {"attn_q", "attn_v", "ffn_down", "token_embd"}
    assert found.languages.keys() == {"nl", "en"}

    plain, better = tmp_path / "plain.gguf", tmp_path / "better.gguf"
    quantizer.quantize_file(trained.full, plain, quantizer.Settings(type="Q4_0"))
    overrides = [("token_embd", "Q8_0")]
    quantizer.quantize_file(trained.full, better, quantizer.Settings(type="Q4_0", overrides=overrides))
    assert abs(better.stat().st_size - plain.stat().st_size - embedding.extra_bytes) < ALIGNMENT

    groups = conversations.by_language(conversations.read(trained.made["data"] / "sft.jsonl"), ["nl", "en"])
    answers = sensitivity.pick_answers(trained.made["merge"], groups, 128, trained.full)
    assert all(0 < tokens(each) <= 64 + max(map(length, each)) for each in answers.values())
    for file, expected in ((plain, found.languages), (better, embedding.languages)):
        assert loss(trained.full, file, answers) == pytest.approx(dict(expected), rel=1e-6)
    assert measured(trained, "--type", "Q4_0")["state"] == "unchanged"


def length(answer: Answer) -> int:
    return len(answer.tokens) - answer.start


def tokens(answers: Sequence[Answer]) -> int:
    return sum(map(length, answers))


def loss(full: Path, file: Path, answers: Mapping[str, Sequence[Answer]]) -> dict[str, float]:
    with GgufModel(full, 256) as sixteen, GgufModel(file, 256) as quantized:
        languages = divergence.measure(sixteen, quantized, answers).languages
    return {code: each["kl_mean"] for code, each in languages.items()}


@pytest.mark.usefixtures("root")
def test_bytes_are_spent_where_they_save_most(trained: Trained) -> None:
    report = measured(trained, "--type", "Q4_0")["artifact"]
    found = sensitivity.read(Path(report) / sensitivity.FILE)
    assert found.roles[0].kl < found.kl, "nothing to gain in this model: nothing was tried"
    budget = found.roles[0].extra_bytes
    flags = ("--type", "Q4_0", "--sensitivity", report, "--spend", f"{budget / 1024:.3f}KiB", "--json")
    dry = json.loads(call("convert", "quantize", trained.full, *flags, "--dry-run").stdout)
    plain, mixed = (
        json.loads(call("convert", "quantize", trained.full, *each).stdout) for each in (("--type", "Q4_0", "--json"), flags)
    )
    assert dry["artifact"] == mixed["artifact"] != plain["artifact"]
    better = artifacts.load(Path(mixed["artifact"])).results["better"]
    before, after = tensor_types(Path(plain["file"])), tensor_types(Path(mixed["file"]))
    grown = Path(mixed["file"]).stat().st_size - Path(plain["file"]).stat().st_size
    assert 0 < grown <= budget + ALIGNMENT * len(after)
    changed = {sensitivity.role_of(name): kind for name, kind in after.items() if kind != before[name]}
    assert changed == better
    assert set(better.values()) == {"Q8_0"}


def test_recipe_spends_and_the_certificate_says_on_what(trained: Trained, root: Path) -> None:
    trained.copy(root, "data", "base", "sft", "dpo", "merge", "gguf")
    settings = ('quantize.types=["Q4_0"]', "quantize.serve=Q4_0", "quantize.spend_mib=1", "quantize.compare=true")
    output = run(root, "run", trained.recipe, *(part for each in settings for part in ("--set", each)), "--json")
    assert output.returncode == 0, output.stderr
    made = {each["step"]: Path(each["artifact"]) for each in json.loads(output.stdout)["steps"]}
    assert {"imatrix", "Q4_0 sensitivity", "Q4_0", "Q4_0 plain"} <= made.keys()
    files = artifacts.load(made["verify"]).results["files"]
    assert files["Q4_0"]["better"] != []
    assert files["Q4_0 plain"]["better"] == []
    assert f"- Q4_0: {', '.join(files['Q4_0']['better'])}." in (made["verify"] / "certificate.md").read_text()


REPORT = Sensitivity(
    model="gguf/another-0123456789ab",
    type="Q4_K_M",
    better="Q8_0",
    kl=0.10,
    languages={"en": 0.10},
    roles=[
        Role("token_embd", "token_embd.weight", 40, 0.05, {"en": 0.05}),  # 0.00125 for a byte
        Role("ffn_down", "blk.0.ffn_down.weight", 30, 0.08, {"en": 0.08}),  # 0.00067
        Role("attn_v", "blk.0.attn_v.weight", 2, 0.09, {"en": 0.09}),  # 0.005
        Role("attn_q", "blk.0.attn_q.weight", 5, 0.101, {"en": 0.101}),  # worse
    ],
)


@pytest.mark.parametrize(
    ("spend", "chosen"),
    [
        (0, []),
        (1, []),
        (2, ["attn_v"]),
        (41, ["attn_v", "ffn_down"]),
        (42, ["attn_v", "token_embd"]),
        (1000, ["attn_v", "token_embd", "ffn_down"]),
    ],
)
def test_most_for_a_byte_first(spend: int, chosen: list[str]) -> None:
    assert [each.role for each in sensitivity.choose(REPORT.roles, REPORT.kl, spend)] == chosen


def test_table_says_what_a_role_is_worth() -> None:
    assert sensitivity.table(REPORT) == [
        "Q4_K_M: KL 0.1000; with Q8_0 for",
        "  token_embd         40 B more, KL 0.0500: 50% of the loss less",
        "  ffn_down           30 B more, KL 0.0800: 20% of the loss less",
        "  attn_v              2 B more, KL 0.0900: 10% of the loss less",
        "  attn_q              5 B more, KL 0.1010: 1% more, so nothing to gain",
    ]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--type", "Q5_K_M", "--sensitivity"), "measured for Q4_K_M, not for Q5_K_M"),
        (("--type", "Q4_K_M", "--type", "Q8_0", "--dry-run", "--sensitivity"), "measured for Q4_K_M, not for Q8_0"),
        (("--type", "Q4_K_M", "--sensitivity"), "measured on gguf/another-0123456789ab, not on gguf/tiny"),
        (("--for-memory", "1GiB", "--sensitivity"), "--for-memory chooses a type"),
        (("--spend", "1MiB", "--imatrix"), "--spend goes with --sensitivity"),
    ],
)
def test_a_report_that_does_not_belong_is_a_usage_error(
    trained: Trained, tmp_path: Path, root: Path, flags: tuple[str, ...], said: str
) -> None:
    file = tmp_path / sensitivity.FILE
    file.write_text(json.dumps(dataclasses.asdict(REPORT)))
    result = call("convert", "quantize", trained.full, *flags, file)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert not root.exists()


@pytest.mark.usefixtures("root")
def test_what_a_person_names_is_not_spent_on(trained: Trained) -> None:
    report = measured(trained, "--type", "Q4_0")["artifact"]
    flags = ("--type", "Q4_0", "--sensitivity", report, "--spend", "1GiB", "--tensor", "token_embd=Q5_0", "--json")
    output = json.loads(call("convert", "quantize", trained.full, *flags).stdout)
    better = artifacts.load(Path(output["artifact"])).results["better"]
    assert better
    assert "token_embd" not in better
    assert tensor_types(Path(output["file"]))["token_embd.weight"] == "Q5_0"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"roles": [{}]}', '{"roles": [], "type": "Q4_0"}'])
def test_what_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / sensitivity.FILE
    file.write_text(text)
    with pytest.raises(ModelFileError, match="no report of `appliance convert sensitivity`"):
        sensitivity.read(file)


@pytest.mark.usefixtures("root")
def test_a_better_type_that_is_none_is_refused(trained: Trained) -> None:
    rows = trained.made["data"] / "sft.jsonl"
    flags = ("--merged", trained.made["merge"], "--conversations", rows, "--type", "Q8_0", "--better", "Q4_K")
    result = call("convert", "sensitivity", trained.full, *flags)
    assert result.exit_code == 1
    assert "better off in Q4_K than Q8_0 leaves it" in result.stderr
