"""The measurement of an engine's memory: what is read out of logs, how it is shown, and one engine that is measured."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from appliance import device
from appliance.errors import EngineFailed, EnvironmentIncomplete
from appliance.recipe import Serve
from appliance.serving import gguf_file
from appliance.serving.memory_plan import ModelToLoad, Plan, plan
from benchmarks import engine_memory, memory
from benchmarks.engine_memory import Measured
from benchmarks.memory import Case, Row
from tests import shaped_gguf

MIB = 1 << 20
LOG = """
event=engine_log model=m pid=7 load_tensors:   CPU_Mapped model buffer size =   372.65 MiB
event=engine_log model=m pid=7 load_tensors:   CPU_REPACK model buffer size =   204.75 MiB
event=engine_log model=m pid=7 load_tensors:          CPU model buffer size =     1.25 MiB
event=engine_log model=m pid=7 llama_context:        CPU  output buffer size =     2.50 MiB
event=engine_log model=m pid=7 llama_kv_cache:        CPU KV buffer size =   448.00 MiB
event=engine_log model=m pid=7 llama_kv_cache:        CPU KV buffer size =    64.00 MiB
event=engine_log model=m pid=7 sched_reserve:        CPU compute buffer size =    16.50 MiB
"""


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    path = shaped_gguf.write(tmp_path_factory.mktemp("models") / "shaped.gguf", shaped_gguf.Shape())
    header = gguf_file.check(path)
    model = ModelToLoad(name="shaped", path=path, header=header, sha256="0" * 64, made_at=0, kind="chat")
    return plan(model, Serve(snapshot_mib=0, slots=2, context_tokens=256, cache_tokens=0), device.machine())


def measured(**changes: Any) -> Measured:
    facts: dict[str, Any] = {
        "buffers": engine_memory.buffer_bytes(LOG),
        "after": {"loading": 700 * MIB},
        "peak_loading": 710 * MIB,
        "peak": 780 * MIB,
        "file": 400 * MIB,
        "seconds": 3.0,
    }
    return Measured(**{**facts, **changes})


def test_buffers_are_read_from_the_log_of_llama_cpp() -> None:
    found = measured()
    assert found.buffers["CPU_Mapped model"] == 390_751_846
    assert found.weights_copied == 206 * MIB, "what is mapped is not copied"
    assert (found.kv, found.computing) == (512 * MIB, 16.5 * MIB)


def test_each_row_says_how_far_off_the_plan_is(planned: Plan) -> None:
    row = Row(case=Case(shape="tiny", quantization="Q4_0", mmap="off"), plan=planned, measured=measured())
    assert row.ratio == pytest.approx(780 * MIB / planned.memory.anonymous_bytes)
    assert row.parts["the rest"][1] == (780 - 206 - 512 - 16.5) * MIB
    assert sum(predicted for predicted, _ in row.parts.values()) == planned.memory.anonymous_bytes
    lines = memory.table([row]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| tiny Q4_0, 4 x 2048, KV f16, mmap off |")
    assert "206" in lines[2]


def test_every_model_has_two_contexts_and_the_first_one_every_way_to_hold_it() -> None:
    found = list(memory.cases(("0.6B", "4B"), ("Q4_K_M", "Q8_0")))
    assert len(found) == len(set(found)) == 2 * 2 * 2 + 4
    assert {(case.slots, case.context_tokens) for case in found} == {(4, 2048), (2, 8192)}
    odd = [case for case in found if (case.kv_type, case.mmap, case.repack) != ("f16", "on", "on")]
    assert {(case.shape, case.quantization) for case in odd} == {("0.6B", "Q4_K_M")}
    assert str(odd[-1]) == "0.6B Q4_K_M, 4 x 2048, KV f16, mmap off, repack off"


def test_a_case_that_does_not_fit_is_said_and_the_others_go_on(planned: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure_case(case: Case) -> Row:
        if case.slots == 2:
            raise EnvironmentIncomplete("it does not fit")
        return Row(case=case, plan=planned, measured=measured())

    monkeypatch.setattr(memory, "measure_case", measure_case)
    result = CliRunner().invoke(memory.memory, ["--shape", "tiny", "--quantization", "Q4_0", "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["schema"] == 1
    assert told["failures"] == {"tiny Q4_0, 2 x 8192, KV f16": "it does not fit"}
    assert [row["case"]["kv_type"] for row in told["rows"]] == ["f16", "q8_0", "f16", "f16", "f16"]
    assert told["rows"][0]["ratio"] == pytest.approx(780 * MIB / planned.memory.anonymous_bytes)


def test_an_engine_is_measured_at_each_kind_of_work(planned: Plan) -> None:
    """The engine's own process; a model so small has nothing to compare, but for the buffers."""
    found = engine_memory.measure(planned.settings, shaped_gguf.Shape().vocabulary)
    work = ["all slots", "bound and drawn answers", "more than can be cached", "a whole context, copied"]
    assert list(found.after) == ["loading", *work]
    assert found.peak >= found.after["more than can be cached"]
    cached = found.after["more than can be cached"] - found.after["loading"]
    assert cached > 0.7 * planned.memory.cache_bytes
    assert found.peak >= found.peak_loading >= found.after["loading"] > planned.memory.kv_bytes + 20 * MIB
    assert found.kv == pytest.approx(planned.memory.kv_bytes, abs=0.01 * MIB)
    assert found.weights_copied == pytest.approx(planned.memory.weights_copied_bytes, abs=0.01 * MIB)
    assert found.file > planned.memory.weights_file_bytes


def test_an_engine_that_refuses_its_model_says_why(planned: Plan, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(Path(planned.settings.model_path).read_bytes()[:-4096])
    settings = msgspec.structs.replace(planned.settings, model_path=str(broken))
    with pytest.raises(EngineFailed, match=r"broken\.gguf was not loaded: .*is truncated"):
        engine_memory.measure(settings, 4096)


@pytest.mark.slow
def test_the_plan_is_within_its_target_of_what_an_engine_takes() -> None:
    case = Case(shape="0.6B", quantization="Q4_K_M")
    row = memory.measure_case(case)
    assert 1 - memory.TARGET <= row.ratio <= 1, row.parts
    copied, kv = row.parts["weights copied"], row.parts["KV"]
    assert copied[0] == pytest.approx(copied[1], rel=0.001)
    assert kv[0] == pytest.approx(kv[1], rel=0.001)
