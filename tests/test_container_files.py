"""What a container sees of its caller's: files that arguments name, settings, the store; and nothing beside them."""

from pathlib import Path

import pytest

from appliance import container_files
from appliance.errors import EnvironmentIncomplete, RecipeError
from tests.container_command import CPU, alone, command_for, values
from tests.fake_files import write


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return alone(tmp_path, monkeypatch)


def test_files_that_arguments_name_are_brought_in(root: Path, tmp_path: Path) -> None:
    files = write(tmp_path / "mine", {"a.pem": "", "b/a.pem": "", "model.gguf": "", "own=base/config.json": "{}"})
    made = write(root, {"gguf/guide-1/model.gguf": ""}) / "gguf/guide-1"
    arguments = ["--model", str(files / "model.gguf"), "--also", str(made), "--adapter", f"x={files / 'a.pem'}"]
    arguments += [
        "--set",
        f"base={files / 'own=base'}",
        f"--tuned={files / 'b/a.pem'}",
        str(files / "a.pem"),
        "--slots",
        "3",
    ]
    command = command_for("serve", *arguments)
    assert command[command.index(CPU) + 2 : -4] == [
        *("--model", "/given/model/model.gguf", "--also", "/data/artifacts/gguf/guide-1", "--adapter", "x=/given/a.pem"),
        *("--set", "base=/given/own=base", "--tuned=/given/a.pem-2", "/given/a.pem", "--slots", "3"),
    ]
    assert [each for each in values(command, "--volume") if each.endswith(":ro")][1:] == [
        f"{files / 'model.gguf'}:/given/model/model.gguf:ro",
        f"{files / 'a.pem'}:/given/a.pem:ro",
        f"{files / 'own=base'}:/given/own=base:ro",
        f"{files / 'b/a.pem'}:/given/a.pem-2:ro",
    ]


def test_model_comes_with_what_counts_beside_it_and_not_with_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An artifact's folder is checked whole; of a model that only lies somewhere nothing else is shown."""
    made = write(tmp_path / "made", {"manifest.json": "{}", "m.gguf": ""})
    home = write(tmp_path / "home", {"m.gguf": "", "m.gguf.tuned.json": "", "recipe.toml": "", ".ssh/id": ""})
    monkeypatch.setenv("HOME", str(home))
    arguments = ["--model", str(home / "m.gguf"), "--also", str(made / "m.gguf")]
    command = command_for("serve", *arguments)
    assert command[command.index(CPU) + 2 : -4] == ["--model", "/given/model/m.gguf", "--also", "/given/artifact/m.gguf"]
    assert [each for each in values(command, "--volume") if each.endswith(":ro")][1:] == [
        f"{home}/m.gguf:/given/model/m.gguf:ro",
        f"{home}/m.gguf.tuned.json:/given/model/m.gguf.tuned.json:ro",
        f"{made}:/given/artifact:ro",
    ]
    for given in (home / "recipe.toml", home, write(tmp_path, {"recipe.toml": ""}) / "recipe.toml", "/"):
        with pytest.raises(RecipeError, match=r"All of .* would be readable"):
            command_for("train", str(given))


def test_link_out_of_a_cache_keeps_the_models_name(tmp_path: Path) -> None:
    blob = write(tmp_path / "blobs", {"5f1c": ""}) / "5f1c"
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/Qwen3.gguf").symlink_to(blob)
    arguments = ["--model", str(tmp_path / "snapshot/Qwen3.gguf")]
    command = command_for("serve", *arguments)
    assert "/given/model/Qwen3.gguf" in command
    assert f"{blob}:/given/model/Qwen3.gguf:ro" in values(command, "--volume")


def test_path_that_an_engine_would_cut_is_refused(tmp_path: Path) -> None:
    files = write(tmp_path / "a:b", {"recipe.toml": ""})
    with pytest.raises(RecipeError, match="has a colon in its name"):
        command_for("train", str(files / "recipe.toml"))


def test_word_without_a_slash_or_a_dot_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"sft/rows": "", "base": ""})
    monkeypatch.chdir(tmp_path)
    command = command_for("train", "--phase", "sft", "--set", "name=base")
    assert command[-4:] == ["--phase", "sft", "--set", "name=base"]


def test_settings_of_the_environment_are_passed_on_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trusted = write(tmp_path, {"signer.pem": ""}) / "signer.pem"
    secret = "0123456789abcdef"
    environ = {"APPLIANCE_SFT_EPOCHS": secret, "CUDA_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "", "OTHER": "x"}
    environ |= dict.fromkeys(("ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "CUDA_DEVICE_ORDER"), "0")
    environ |= {"APPLIANCE_TRUSTED_KEY": str(trusted), "APPLIANCE_API_KEY": secret, "APPLIANCE_SERVE_PORT": "9000"}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    command = command_for("serve")
    passed = values(command, "--env")
    assert {"APPLIANCE_SFT_EPOCHS", *container_files.CARDS} - {"HSA_OVERRIDE_GFX_VERSION"} <= set(passed)
    assert "APPLIANCE_TRUSTED_KEY=/given/signer.pem" in passed
    assert not {"OTHER", "APPLIANCE_API_KEY", "APPLIANCE_ARTIFACTS"} & {each.partition("=")[0] for each in passed}
    assert secret not in " ".join(command)
    assert values(command, "--publish") == ["127.0.0.1:9000:8080"]


def test_training_without_a_network_is_told_no_address_for_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPLIANCE_METRICS_PORT", "9465")
    command = command_for("train")
    assert "APPLIANCE_METRICS_PORT" not in values(command, "--env")


def test_store_that_lies_elsewhere_is_brought_in_and_its_key_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPLIANCE_STORE", str(tmp_path / "db/keys.sqlite3"))
    command = command_for("serve")
    assert f"{tmp_path}/db:/data/store" in values(command, "--volume")
    assert f"{tmp_path}/store.key:/data/store.key:ro" in values(command, "--volume")
    assert {"APPLIANCE_STORE=/data/store/keys.sqlite3", "APPLIANCE_KEY_FILE=/data/store.key"} <= set(
        values(command, "--env")
    )


@pytest.mark.parametrize("name", ["state/keys.sqlite3", "other.sqlite3", "store.sqlite3"])
def test_store_among_the_artifacts_is_found_there_whatever_its_name(
    name: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APPLIANCE_STORE", str(root / name))
    command = command_for("serve")
    assert f"APPLIANCE_STORE=/data/artifacts/{name}" in values(command, "--env")
    assert not any("/data/store:" in f"{each}:" for each in values(command, "--volume"))


def test_store_that_shares_its_folder_is_not_brought_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is mounted for it could be written as a whole."""

    def refused(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    folder = write(tmp_path / "srv", {"s.sqlite3": "", "s.sqlite3-wal": "", "lost+found/x": ""})
    monkeypatch.setenv("APPLIANCE_STORE", str(folder / "s.sqlite3"))
    assert f"{folder}:/data/store" in values(command_for("serve"), "--volume")
    write(folder, {"website/index.html": ""})
    with pytest.raises(RecipeError, match=r"lies beside website; move the store into a folder of its own"):
        command_for("serve")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "iterdir", refused)
        with pytest.raises(EnvironmentIncomplete, match="cannot be read by user"):
            command_for("serve")
    empty = tmp_path / "empty"
    for name, value in (("APPLIANCE_STORE", empty / "s.sqlite3"), ("APPLIANCE_KEY_FILE", empty / "keys/store.key")):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(RecipeError, match="beside what is yours alone"):
        command_for("serve")
