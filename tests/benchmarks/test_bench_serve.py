"""`python -m benchmarks.serve` with stand-in servers: order, failures that stay where they are, reports, interrupts."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from appliance.errors import EnvironmentIncomplete, ServerError
from benchmarks import peers, plan, prompts, serve, workloads
from benchmarks.figures import Figure
from benchmarks.plan import ROWS, take, turns
from benchmarks.servers import SERVERS
from tests import tiny_gguf
from tests.benchmarks.stand_ins import PROMPTS, stand_in, trial
from tests.serving.serving_process import is_alive, until

NAMES = tuple(SERVERS)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model file that no server loads: all four are stand-ins."""
    for name in NAMES:
        monkeypatch.setitem(SERVERS, name, stand_in(name=name))
    monkeypatch.setattr(prompts, "read", lambda _: PROMPTS)
    return tiny_gguf.write(tmp_path / "model.gguf")


def bench(model: Path, *arguments: str) -> Result:
    output = model.parent / "out"
    result = CliRunner().invoke(serve.serve, ["--model", str(model), "--output", str(output), *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


class TestTurns:
    def test_who_begins_moves_on_from_round_to_round(self) -> None:
        found = list(turns(3, ["decode"], NAMES[:3]))
        assert [turn.server for turn in found] == [
            *("ours", "llama-server", "llama_cpp.server"),
            *("llama-server", "ours"),  # a Python server takes part in the first rounds only
            *("ours", "llama-server"),
        ]

    def test_a_phase_is_measured_with_every_server_before_the_next(self) -> None:
        found = list(turns(1, ROWS, NAMES[:2]))
        assert [(turn.rows[0], turn.server) for turn in found[:4]] == [
            *(("start", "ours"), ("start", "llama-server"), ("cold-start", "ours"), ("cold-start", "llama-server")),
        ]
        assert found[0].rows == ("start", "decode", "cold", "beside", "schema")

    def test_every_row_is_measured_with_us(self) -> None:
        found = {row for turn in turns(1, ROWS, NAMES) if turn.server == "ours" for row in turn.rows}
        assert found == set(ROWS)

    def test_what_more_rounds_would_not_make_clearer_is_measured_in_few(self) -> None:
        found = list(turns(5, ROWS, NAMES))
        assert [turn.round for turn in found if turn.rows == ("memory",) and turn.server == "ours"] == [1]
        assert [turn.round for turn in found if turn.server == "example-server"] == [1]
        assert [turn.round for turn in found if turn.rows == ("prefix",) and turn.server == "ours"] == [1, 2, 3, 4, 5]

    def test_who_asks_for_rounds_of_a_row_gets_them(self) -> None:
        found = list(turns(3, ["memory", "decode"], NAMES, are_all=True))
        assert [turn.round for turn in found if turn.rows == ("memory",) and turn.server == "ours"] == [1, 2, 3]
        assert [turn.round for turn in found if turn.server == "example-server"] == [1, 2, 3]

    def test_python_peers_take_part_where_it_says_something(self) -> None:
        found = {row for turn in turns(1, ROWS, NAMES) if turn.server == "llama_cpp.server" for row in turn.rows}
        assert found == {"decode", "q4_0", "memory"}


class TestTake:
    def rows_of(self, folder: Path, manner: str, rows: Sequence[str]) -> dict[str, str]:
        """Each row with its problem."""
        turn = plan.Turn(server="ours", round=1, rows=rows)
        return {figure.row: figure.problem for figure in asyncio.run(take(turn, trial(folder, manner)))}

    def test_all_rows_of_a_good_server_are_had(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("HEAD_START_SECONDS", "IDLE_SECONDS"):
            monkeypatch.setattr(workloads, name, 0.01)
        for rows in (list(plan.CHATS), ["prefix"], ["cold-start"], ["memory"], ["q4_0"]):
            found = self.rows_of(tmp_path, "good", rows)
            assert found
            assert not any(found.values()), found

    def test_a_server_that_does_not_start_costs_its_own_rows(self, tmp_path: Path) -> None:
        found = self.rows_of(tmp_path, "refusing", ["cold", "schema"])
        assert set(found) == {"cold", "schema"}
        assert all("no such option" in problem for problem in found.values())

    def test_what_was_measured_before_a_server_died_is_kept(self, tmp_path: Path) -> None:
        found = self.rows_of(tmp_path, "mortal", ["decode", "cold"])
        assert "ended with exit code 3" in found["decode"]
        assert "ended with exit code 3" in found["cold"]

    def test_a_row_that_fails_leaves_the_next(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        async def fail(*_: object) -> Sequence[Figure]:
            raise ServerError("no luck")

        monkeypatch.setitem(plan.CHATS, "decode", plan.ChatRows(servers=NAMES, run=fail))
        assert self.rows_of(tmp_path, "good", ["decode", "cold"]) == {"decode": "no luck", "ttft-cold": ""}

    def test_rows_of_their_own_fail_alone(self, tmp_path: Path) -> None:
        assert "did not answer: status 503" in self.rows_of(tmp_path, "full", ["memory"])["memory"]


class TestCommand:
    def test_reports_for_people_and_for_programs(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(workloads, "DECODE_TOKENS", {1: 16, 4: 16, 8: 16})
        result = bench(model, "--rows", "decode,start", "--rounds", "2", "--quick")
        assert result.exit_code == 0, result.output
        assert "| decode, 8 streams | tokens/s |" in result.stdout
        assert "2/10 round 1, llama-server: decode" not in result.stdout  # progress is no result
        written = json.loads((model.parent / "out/report.json").read_text())
        assert written["schema"] == 1
        assert written["head"]["rounds"] == 2
        assert written["summary"]["decode-4"]["ours"]["rounds"] == 2
        for key in ("command", "commit", "CPU", "memory", "versions", "load average before", "load average after"):
            assert written["head"][key]
        assert (model.parent / "out/report.md").read_text() in result.stdout

    def test_json_is_the_same_report(self, model: Path) -> None:
        result = bench(model, "--rows", "cold", "--servers", "ours", "--quick", "--json")
        assert json.loads(result.stdout)["summary"]["ttft-cold"]["ours"]["rounds"] == 1

    def test_targets_are_judged_unless_it_is_quick(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(workloads, "DECODE_TOKENS", {1: 8, 4: 8, 8: 8})
        result = bench(model, "--rows", "decode", "--servers", "ours,llama-server", "--rounds", "1")
        assert result.exit_code == 0
        assert "wanted ≥ 1" in result.stdout

    def test_a_server_that_is_not_built_is_left_out_and_named(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def binary(name: str) -> Path:
            raise EnvironmentIncomplete(f"{name} is not built; run `make bench-peers`.")

        monkeypatch.undo()
        monkeypatch.setattr(peers, "binary", binary)
        monkeypatch.setattr(prompts, "read", lambda _: PROMPTS)
        monkeypatch.setitem(SERVERS, "ours", stand_in(name="ours"))
        result = bench(model, "--rows", "cold", "--servers", "ours,llama-server", "--quick")
        assert result.exit_code == 0
        assert "llama-server is left out: llama-server is not built; run `make bench-peers`." in result.stderr
        assert bench(model, "--rows", "cold", "--servers", "llama-server").exit_code == 3

    def test_one_server_that_fails_leaves_the_others(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(SERVERS, "llama-server", stand_in("refusing", "llama-server"))
        result = bench(model, "--rows", "cold", "--quick")
        assert result.exit_code == 0
        assert "llama-server did not start (exit code 2)" in result.stdout
        assert "| first token, 500 tokens never seen |" in result.stdout

    @pytest.mark.parametrize("wrong", [("--rows", "deocde"), ("--servers", "vllm")])
    def test_unknown_names_are_refused_with_those_that_are_known(self, model: Path, wrong: Sequence[str]) -> None:
        result = bench(model, *wrong)
        assert result.exit_code == 2
        assert "is none of" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_servers_and_leaves_what_was_measured(model: Path, number: int) -> None:
    program = (
        "from benchmarks import prompts, serve\n"
        "from benchmarks.servers import SERVERS\n"
        "from tests.benchmarks.stand_ins import PROMPTS, stand_in\n"
        "prompts.read = lambda _: PROMPTS\n"
        "SERVERS.update(ours=stand_in(name='ours'))\n"
        "serve.serve()"
    )
    output = model.parent / "out"
    arguments = ["--model", str(model), "--servers", "ours", "--rows", "cold", "--rounds", "1000", "--output", str(output)]
    with subprocess.Popen([sys.executable, "-c", program, *arguments], stderr=subprocess.PIPE, text=True) as process:
        until((output / "report.json").exists)
        until(lambda: children(process.pid))
        pids = children(process.pid)
        os.kill(process.pid, number)
        assert process.wait() == 130
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    assert not any(is_alive(pid) for pid in pids)
    assert json.loads((output / "report.json").read_text())["summary"]["ttft-cold"]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
