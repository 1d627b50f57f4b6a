"""Servers are started, waited for and ended whole, and what goes wrong with them is told with the end of their log."""

import asyncio
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from appliance.errors import EnvironmentIncomplete, ServerError
from benchmarks import peers, processes, servers
from benchmarks.client import Answer, ask
from benchmarks.servers import SERVERS, Running, running
from tests.benchmarks.stand_ins import launch, stand_in
from tests.serving.serving_process import is_alive, until


def with_running(folder: Path, manner: str, use: Callable[[Running], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        async with running(stand_in(manner), launch(folder)) as run:
            return await use(run)

    return asyncio.run(main())


async def one_answer(run: Running) -> Answer:
    answer = await ask(run.chat([{"role": "user", "content": "hallo"}], 3), patience_seconds=20.0)
    run.check([answer])
    return answer


class TestRunning:
    def test_is_ready_when_the_block_begins_and_gone_when_it_ends(self, tmp_path: Path) -> None:
        async def use(run: Running) -> int:
            assert (await one_answer(run)).text == "0 1 2 "
            assert run.total_cpu_seconds() >= run.server_cpu_seconds() > 0
            return run.process.pid

        assert not is_alive(with_running(tmp_path, "late", use))

    def test_one_that_does_not_start_is_told_with_its_log(self, tmp_path: Path) -> None:
        with pytest.raises(ServerError, match=r"refusing did not start \(exit code 2\)(.|\n)*no such option"):
            with_running(tmp_path, "refusing", one_answer)

    def test_one_that_dies_is_told_with_its_log(self, tmp_path: Path) -> None:
        async def use(run: Running) -> None:
            for _ in range(3):
                await one_answer(run)

        with pytest.raises(ServerError, match=r"mortal ended with exit code 3(.|\n)*out of luck"):
            with_running(tmp_path, "mortal", use)

    def test_a_refusal_where_none_is_expected_is_told(self, tmp_path: Path) -> None:
        with pytest.raises(ServerError, match="full did not answer: status 503"):
            with_running(tmp_path, "full", one_answer)

    def test_one_that_ignores_signals_is_killed_with_its_children(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(servers, "END_SECONDS", 0.3)

        async def use(run: Running) -> list[int]:
            return list(processes.tree(run.process.pid))

        pids = with_running(tmp_path, "deaf", use)
        assert len(pids) == 2
        assert not any(is_alive(pid) for pid in pids)

    def test_is_ended_when_the_run_is_interrupted(self, tmp_path: Path) -> None:
        pids: list[int] = []

        async def use(run: Running) -> None:
            pids.append(run.process.pid)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            with_running(tmp_path, "good", use)
        assert not is_alive(pids[0])

    def test_is_ended_when_the_benchmark_is_killed(self, tmp_path: Path) -> None:
        program = (
            "import asyncio, sys, time; from pathlib import Path; from benchmarks.servers import running\n"
            "from tests.benchmarks.stand_ins import launch, stand_in\n"
            "async def main():\n"
            "    async with running(stand_in(), launch(Path(sys.argv[1]))) as run:\n"
            "        print(run.process.pid, flush=True)\n"
            "        time.sleep(600)\n"
            "asyncio.run(main())"
        )
        command = [sys.executable, "-c", program, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            pid = int(process.stdout.readline())
            assert is_alive(pid)
            process.kill()
        until(lambda: not is_alive(pid))

    def test_settings_of_this_shell_reach_no_server(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("APPLIANCE_SERVE_SLOTS", "1")
        monkeypatch.setenv("LLAMA_ARG_SERVE", "1")
        monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")

        async def environment(run: Running) -> str:
            return Path(f"/proc/{run.process.pid}/environ").read_text()

        found = with_running(tmp_path, "good", environment)
        assert "APPLIANCE_" not in found
        assert "LLAMA_ARG" not in found
        assert "OMP_WAIT" not in found


class TestCommands:
    def test_every_server_gets_the_same_model_threads_and_context(self, tmp_path: Path) -> None:
        (tmp_path / "llama-server").touch()
        (tmp_path / "example_server.py").touch()  # or the source distribution would be read
        setting = dataclasses.replace(launch(tmp_path), binaries=tmp_path)
        for server in SERVERS.values():
            line = " ".join(server.command(setting, 8123))
            if server.name == "example-server":
                line = (tmp_path / "example_server.json").read_text()
            assert "model.gguf" in line
            assert "8123" in line
            assert re.search(r"threads(_batch)?\W+1\b", line)
            total = setting.slots * setting.context_tokens
            assert str(total) in line or f"--context-tokens {setting.context_tokens}" in line

    def test_a_command_is_shown_without_the_paths_of_this_machine(self, tmp_path: Path) -> None:
        line = servers.shown(SERVERS["ours"], launch(tmp_path))
        assert "python -m appliance serve --model model.gguf" in line
        assert "APPLIANCE_SERVE_SPECULATION=off" in line
        assert str(tmp_path) not in line

    def test_peers_without_a_field_for_it_are_kept_from_the_end_of_text(self, tmp_path: Path) -> None:
        fields = SERVERS["llama_cpp.server"].fields(launch(tmp_path))
        assert fields["logit_bias"] == {"2": -100.0, "3": -100.0}

    def test_a_peer_that_was_not_built_is_missing_with_the_remedy(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def binary(name: str) -> Path:
            raise EnvironmentIncomplete(f"{name} is not built; run `make bench-peers`.")

        monkeypatch.setattr(peers, "binary", binary)
        assert "make bench-peers" in (servers.missing(SERVERS["llama-server"], launch(tmp_path)) or "")
        assert servers.missing(SERVERS["ours"], launch(tmp_path)) is None

    def test_only_peers_get_the_bound_on_spinning(self, tmp_path: Path) -> None:
        setting = dataclasses.replace(launch(tmp_path), peer_spins=1000)
        assert SERVERS["llama-server"].environment(setting) == {"GOMP_SPINCOUNT": "1000"}
        assert "GOMP_SPINCOUNT" not in SERVERS["ours"].environment(setting)
        assert SERVERS["llama-server"].environment(launch(tmp_path)) == {}

    def test_a_cache_is_the_same_number_of_bytes_in_both_words_for_it(self, tmp_path: Path) -> None:
        setting = dataclasses.replace(launch(tmp_path), binaries=tmp_path, cache_tokens=1024, cell_bytes=112 * 1024)
        (tmp_path / "llama-server").touch()
        command = SERVERS["llama-server"].command(setting, 0)
        assert command[command.index("--cache-ram") + 1] == "112"
        assert SERVERS["ours"].environment(setting)["APPLIANCE_SERVE_CACHE_TOKENS"] == "1024"


def test_json_of_the_example_is_valid(tmp_path: Path) -> None:
    (tmp_path / "example_server.py").touch()
    SERVERS["example-server"].command(launch(tmp_path), 5)
    assert json.loads((tmp_path / "example_server.json").read_text())["model"]["n_seq_max"] == 2
