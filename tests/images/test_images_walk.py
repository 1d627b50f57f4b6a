"""`make image-test`: what a person types: `make train` and `make serve`, and the page on a PC without a network."""

import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import pytest

from appliance import promotion
from tests import tiny_artifact, tiny_recipe
from tests.images.conftest import REPOSITORY
from tests.images.image_engine import BASE, CERTIFICATES, ImageEngine

pytestmark = pytest.mark.image

PAGE = REPOSITORY / "docs/shelter-pc.md"
READY_SECONDS = 90.0
STEP_SECONDS = 900.0
DEBIAN = "debian:bookworm-slim"


@pytest.mark.usefixtures("rows")
def test_make_train_and_make_serve_use_the_images(engine: ImageEngine, tmp_path: Path) -> None:
    """From rows to an answer, with the caller's folders and user, no network while it trains, and the commands shown."""
    recipe = tiny_recipe.write(tmp_path / "recipe")
    root = tmp_path / "mine" / "artifacts"
    port = free_port()
    environ = {**engine.environment, "ENGINE": "podman", "BACKEND": "cpu", "APPLIANCE_ARTIFACTS": str(root)}
    environ["APPLIANCE_KEY_FILE"] = str(tmp_path / "mine" / "secret" / "store.key")
    made = subprocess.run(
        ["make", "--silent", "train", f"RECIPE={recipe}"], cwd=REPOSITORY, env=environ, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr[-4000:]
    assert "podman run --rm --interactive --read-only" in made.stderr
    assert "--network none" in made.stderr
    promoted = promotion.current(root)
    assert promoted is not None
    server = subprocess.Popen(
        ["make", "--silent", "serve", f"ARGS=--port {port}"], cwd=REPOSITORY, env=environ, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/readyz")
        key = (root.parent / "keys" / "chat.key").read_text().strip()
        chat = [sys.executable, "-m", "appliance", "chat", "Waar is de balie?", "--url", f"http://127.0.0.1:{port}"]
        asked = subprocess.run([*chat, "--key", key], capture_output=True, text=True, check=True)
        assert asked.stdout.strip()
    finally:
        server.send_signal(signal.SIGTERM)
        _, said = server.communicate(timeout=60)
    assert f"--publish 127.0.0.1:{port}:8080" in said


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(address: str) -> None:
    started = time.monotonic()
    while True:
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except OSError:
            assert time.monotonic() - started < READY_SECONDS, f"{address} does not answer"
            time.sleep(0.2)


def steps() -> Mapping[str, list[str]]:
    """The page's commands, by the title that they stand under."""
    found: dict[str, list[str]] = {}
    for part in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        found[part.partition("\n")[0]] = re.findall(r"^```sh\n(.*?)^```$", part, re.MULTILINE | re.DOTALL)
    return found


@pytest.mark.usefixtures("rows")
def test_a_pc_without_a_network_from_blank_to_answering(
    engine: ImageEngine, options: list[str], stick: Path, tmp_path: Path
) -> None:
    """Each step of the page in its order; what differs here is said in `here`, and nothing else."""
    media = tmp_path / "stick"
    media.mkdir()
    there = stick.parent / "there"
    engine.run("podman", "tag", BASE, f"localhost/{DEBIAN}")
    words = {"/media/stick": str(media), "127.0.0.1:8080:8080": "127.0.0.1::8080"}
    words[".venv/bin/appliance"] = str(Path(sys.executable).with_name("appliance"))
    # Where packages come from is this machine's affair.
    words[f"/packages {DEBIAN}"] = f"/packages --network host --volume {CERTIFICATES} {DEBIAN}"

    def here(command: str) -> str:
        for written, meant in words.items():
            command = command.replace(written, meant)
        return command

    environ = {**engine.environment, "APPLIANCE_ARTIFACTS": str(there), "BUILD_ARGS": shlex.join(options)}

    def typed(command: str) -> str:
        result = subprocess.run(
            ["bash", "-ec", here(command)], cwd=REPOSITORY, env=environ, capture_output=True, text=True, timeout=STEP_SECONDS
        )
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
        return result.stdout

    fill, set_up, start, ask, after = (commands for title, commands in steps().items() if title[0].isdigit())
    for command in fill:
        typed(command)
    assert sorted(path.name for path in media.iterdir()) == ["appliance.tar", "guide.appliance", "packages"]
    (install,) = set_up
    blank = ("podman", "run", "--rm", "--network", "none", "--volume", f"{media}:/media/stick:ro", BASE)
    assert "podman version" in engine.run(*blank, "bash", "-ec", f"{install}\npodman --version").stdout
    try:
        load_and_run, enable = start
        typed("podman image rm --force edge-appliance:cpu-model")
        typed(load_and_run)
        assert enable == "systemctl enable podman-restart.service\n"  # there is no systemd here
        answer, key = ask
        assert typed(answer).strip()
        assert len(typed(key).strip()) > 20
        doctor, bring = after
        assert "memory" in typed(doctor)
        tiny_artifact.exported(tmp_path / "newer", media / "new.appliance", revision=2)
        assert "gguf/tiny" in typed(bring)
        assert typed("podman stop --time 45 appliance")
        state = json.loads(engine.run("podman", "container", "inspect", "appliance").stdout)[0]["State"]
        assert state["ExitCode"] == 0
    finally:
        engine.run("podman", "rm", "--force", "appliance", is_checked=False)
        engine.run("podman", "volume", "rm", "--force", "appliance", is_checked=False)
