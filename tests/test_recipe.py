"""Recipes: what is read from where, and what is said of mistakes."""

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from appliance import recipe as recipes
from appliance.errors import RecipeError
from appliance.training_settings import Dpo, Grpo, Kto, Lora, Orpo, Passages, Phase, Sft
from tests import tiny_recipe
from tests.running import call

PHASES = {"lora": Lora, "sft": Sft, "dpo": Dpo, "kto": Kto, "orpo": Orpo, "grpo": Grpo, "passages": Passages}
SHELTER = Path(__file__).parents[1] / "recipes" / "shelter" / "recipe.toml"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tiny_recipe.write(tmp_path / "recipe")


def refused(path: Path, *sets: str) -> str:
    with pytest.raises(RecipeError) as caught:
        recipes.load(path, sets)
    return str(caught.value)


def test_shipped_recipe_loads() -> None:
    recipe = recipes.load(SHELTER)
    assert recipe.languages == ("nl", "en", "pl", "ar")
    assert recipe.phases == ("sft", "dpo")


def test_paths_are_relative_to_the_recipe_and_flags_to_the_current_folder(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = path.parent.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    recipe = recipes.load(path, ["data.dpo=mine.jsonl"])
    assert recipe.data.sft == path.parent / "sft.jsonl"
    assert recipe.data.dpo == elsewhere / "mine.jsonl"


def test_flag_beats_environment_beats_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert recipes.load(path).sft.epochs == 10
    monkeypatch.setenv("APPLIANCE_SFT_EPOCHS", "5")
    assert recipes.load(path).sft.epochs == 5
    assert recipes.load(path, ["sft.epochs=6"]).sft.epochs == 6


def test_starter_settings_apply_to_the_starter_alone(path: Path) -> None:
    path.write_text(f"{tiny_recipe.RECIPE}\n[with_starter.sft]\nepochs = 99\n")
    assert recipes.load(path).sft.epochs == 99
    assert recipes.load(path, ["base=some/model"]).sft.epochs == 10
    assert recipes.load(path, ["sft.epochs=4"]).sft.epochs == 4


def test_documented_defaults_are_those_that_hold() -> None:
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    stated = re.findall(r"^\| `(\w+)\.(\w+)` \| (\S+) \|", text, re.M)
    assert len(stated) == 15
    for section, key, value in stated:
        fields = {field.name: field.default for field in dataclasses.fields(PHASES[section])}
        assert tomllib.loads(f"value = {value}")["value"] == fields[key], f"{section}.{key}"
    shared = {field.name for field in dataclasses.fields(Phase)} & {key for section, key, _ in stated if section == "sft"}
    for kind in (Dpo, Kto, Orpo, Grpo, Passages):
        defaults = {field.name: field.default for field in dataclasses.fields(kind)}
        assert {key: defaults[key] for key in shared} == {
            field.name: field.default for field in dataclasses.fields(Sft) if field.name in shared
        }


def test_several_mistakes_are_reported_together(path: Path) -> None:
    path.write_text(
        tiny_recipe.RECIPE.replace("[lora]\nrank", "[lora]\nrankk").replace("[sft]\nepochs = 10", "[sft]\nepochs = 0")
    )
    said = refused(path, "starter.layers=many", "quantize.serv=Q8_0", "nonsense")
    for mistake in (
        "5 problems",
        "lora.rankk: unknown key; did you mean 'rank'?",
        "sft.epochs: 0 is out of range; it must be at least 1",
        "starter.layers: expected int, found 'many'",
        "quantize.serv: unknown key; did you mean 'serve'?",
        "--set 'nonsense': expected key=value",
    ):
        assert mistake in said


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ('quantize.types=["Q8_0"]', None),
        ("quantize.serve=Q6_K", "quantize.serve: 'Q6_K' is not made; quantize.types has Q8_0, Q4_K_M"),
        ("quantize.serve=F16", None),
        ('quantize.types=["Q3"]', "quantize.types[0]: 'Q3' is not one of"),
        ('phases=["dpo"]', "phases: the first phase must be 'sft'"),
        ("phases=[]", "phases: the first phase must be 'sft'"),
        ('phases=["sft", "passages", "dpo"]', "phases: they run in the order sft, dpo, passages"),
        ('phases=["sft", "sft"]', "phases: sft, sft names a phase twice"),
        ("languages=[]", "languages: must name at least one"),
        ("starter.heads=3", "starter.kv_heads: 2 does not divide starter.heads 3"),
        ("name=a/b", "name: 'a/b' may have only ASCII letters"),
        ("name=é", "name: 'é' may have only ASCII letters"),
        ("sft.max_tokens=300", "sft.max_tokens: 300 exceeds starter.context_tokens 256"),
        ("data=3", "data: expected a table, found 3"),
        ("data.sft=3", "data.sft: expected Path, found 3"),
        ("data.columns.grpo.prompt=q", "data.columns.grpo: there is no data.grpo whose columns it could name"),
        ("data.columns.sft.prompt=", "data.columns.sft.prompt: must not be empty"),
        ("data.columns.faq.prompt=q", "data.columns.faq: unknown key; known keys: dpo, grpo, heldout, kto, sft"),
        ("base=", "base: must not be empty"),
    ],
)
def test_contradictions(path: Path, setting: str, said: str | None) -> None:
    if said is None:
        recipes.load(path, [setting])
    else:
        assert said in refused(path, setting)


def test_preferences_are_needed_for_dpo_only(path: Path) -> None:
    path.write_text(tiny_recipe.RECIPE.replace('dpo = "dpo.jsonl"\n', ""))
    assert "data.dpo: missing, and phases names 'dpo'" in refused(path)
    assert recipes.load(path, ['phases=["sft"]']).data.dpo is None


def test_only_phases_that_run_must_fit_the_starter(path: Path) -> None:
    small = ["starter.context_tokens=128", "sft.max_tokens=128"]
    assert "dpo.max_tokens: 256 exceeds starter.context_tokens 128" in refused(path, *small)
    assert recipes.load(path, [*small, 'phases=["sft"]']).dpo.max_tokens == 256


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"name = ", "is not valid TOML"), (b"\xff\xfe", "is not valid TOML"), (b"", "name: missing; it has no default")],
)
def test_unreadable_recipe(path: Path, content: bytes, said: str) -> None:
    path.write_bytes(content)
    assert said in refused(path)


def test_missing_recipe_and_folder(tmp_path: Path) -> None:
    assert "does not exist; start from a copy of recipes/shelter" in refused(tmp_path / "no.toml")
    assert "is a folder; name the recipe file" in refused(tmp_path)


def test_command_exits_2_and_makes_nothing(path: Path, root: Path) -> None:
    result = call("run", path, "--set", "sft.epoch=3")
    assert result.exit_code == 2
    assert "did you mean 'epochs'" in result.stderr
    assert not root.exists()
