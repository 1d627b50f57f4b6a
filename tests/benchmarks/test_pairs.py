"""`python -m benchmarks.pairs` with stand-in servers: what is asked of both, what is told, a server that does not come."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from appliance.errors import ApplianceError
from benchmarks import pairs, prompts, workloads
from benchmarks.servers import SERVERS
from tests import tiny_gguf
from tests.benchmarks.stand_ins import PROMPTS, launch, stand_in


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model file that no server loads."""
    for name in (pairs.OURS, pairs.PEER):
        monkeypatch.setitem(SERVERS, name, stand_in(name=name))
    monkeypatch.setattr(prompts, "read", lambda _: PROMPTS)
    monkeypatch.setattr(workloads, "DECODE_TOKENS", {1: 8, 4: 8, 8: 8})
    return tiny_gguf.write(tmp_path / "model.gguf")


def measured(model: Path, *arguments: str) -> Result:
    result: Result = CliRunner().invoke(pairs.pairs, ["--model", str(model), *arguments])
    return result


def test_every_row_is_asked_of_both_and_told_as_the_median_of_ratios(model: Path) -> None:
    result = measured(model, "--pairs", "3", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert set(told["rows"]) == set(pairs.ROWS)
    for row in told["rows"].values():
        assert row["pairs"] == len(row["values"]) == 3
        ratios = sorted(ours / peer for ours, peer in row["values"])
        assert row["ratio"] == ratios[1]
        assert ratios[0] <= row["quartiles"][0] <= row["quartiles"][1] <= ratios[2]
    assert told["head"]["commit"]


def test_the_table_says_which_way_is_better(model: Path) -> None:
    lines = measured(model, "--pairs", "2", "--row", "decode-1", "--row", "short").stdout.splitlines()
    rates, waits = (next(line for line in lines if line.startswith(f"| {start}")) for start in ("decode, 1", "first token"))
    assert rates.endswith("| more |")
    assert waits.endswith("| less |")


def test_a_server_that_does_not_start_is_an_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SERVERS, pairs.PEER, stand_in("refusing", pairs.PEER))
    result = measured(model, "--pairs", "2", "--row", "short")
    assert result.exit_code != 0
    assert "llama-server did not start (exit code 2)" in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit | ApplianceError)


def test_as_they_come_leaves_every_setting_to_the_servers(tmp_path: Path) -> None:
    started = launch(tmp_path)
    words = pairs.as_it_comes(SERVERS[pairs.OURS]).command(started, 8080)
    assert words[1:] == ["-m", "appliance", "serve", "--model", str(started.model), "--host", "127.0.0.1", "--port", "8080"]
    assert pairs.as_it_comes(SERVERS[pairs.OURS]).environment(started) == {
        "APPLIANCE_ARTIFACTS": str(tmp_path / "artifacts"),  # never the folder of whoever measures
        "APPLIANCE_SERVE_SPECULATION": "off",
    }
    assert pairs.as_it_comes(SERVERS[pairs.PEER]).environment(started) == {}
