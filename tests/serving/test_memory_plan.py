"""The memory plan: what is predicted against what a process takes, and how a model that does not fit is stepped down."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance import device
from appliance.device import Machine
from appliance.errors import EnvironmentIncomplete
from appliance.recipe import Serve
from appliance.serving import gguf_file
from appliance.serving.memory_plan import ModelToLoad, Plan, plan
from appliance.serving.memory_prediction import (
    ANSWER_TOKEN_BYTES,
    MIB,
    PROCESS_BYTES,
    WORK_VALUE_BYTES,
    Choice,
    compute_bytes,
    compute_tokens,
    output_rows,
    predict,
)
from tests import shaped_gguf
from tests.shaped_gguf import Shape

X86 = frozenset({"avx2"})
ROOMY = Machine(
    usable_cores=4,
    physical_cores=2,
    memory_total_bytes=8192 * MIB,
    memory_available_bytes=6000 * MIB,
    cpu_features=X86,
)
# Untied: its embedding is an eighth of the file; 28 MiB of weights and 1 KiB of KV (f16) a token.
SHAPE = Shape(layers=4, hidden=512, feed_forward=2048, heads=8, kv_heads=2, vocabulary=16000, context_tokens=4096)


SMALL: dict[str, Any] = {"cache_tokens": 0, "kv_type": "q8_0", "is_mapped": True, "is_repacked": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelToLoad:
    return to_load(shaped_gguf.write(tmp_path_factory.mktemp("models") / "shaped.gguf", SHAPE))


def to_load(path: Path, **changes: Any) -> ModelToLoad:
    header = gguf_file.read_metadata(path)
    return ModelToLoad(
        **{"name": "shaped", "path": path, "header": header, "sha256": "0" * 64, "made_at": 0, "kind": "chat", **changes}
    )


def with_free(free_bytes: int) -> Machine:
    """A machine with so much memory for one model, after its reserve."""
    machine = dataclasses.replace(ROOMY, memory_total_bytes=1024 * MIB)
    return dataclasses.replace(machine, memory_available_bytes=free_bytes + 64 * MIB)


def fitted(model: ModelToLoad, free_bytes: int, *explicit: str, **settings: Any) -> Plan:
    return plan(model, Serve(**settings), with_free(free_bytes), explicit=explicit)


def total(model: ModelToLoad, **changes: Any) -> int:
    asked = {"slots": 2, "context_tokens": 2048, "cache_tokens": 4096, "kv_type": "f16", "is_mapped": False}
    return predict(model.header, Choice(**{**asked, "is_repacked": True, **changes}), X86).total_bytes


def test_everything_as_asked_where_there_is_room(model: ModelToLoad) -> None:
    settings = plan(model, Serve(), ROOMY).settings
    assert settings.notes == ()
    assert (settings.slots, settings.context_tokens) == (2, 2048)
    assert (settings.cells, settings.cache_tokens) == (2 * 2048, 4096)
    assert (settings.kv_type, settings.is_mapped, settings.is_repacked) == ("f16", True, True)
    assert (settings.threads_decode, settings.threads_prefill) == (2, 4)


def test_steps_down_one_after_the_other(model: ModelToLoad) -> None:
    """Each limit lies just under what the step before needs."""
    unmapped = fitted(model, total(model)).settings
    assert (unmapped.is_mapped, unmapped.is_repacked, unmapped.cache_tokens) == (False, True, 4096)
    less_cache = fitted(model, total(model) - 1).settings
    assert (less_cache.kv_type, less_cache.slots) == ("f16", 2)
    assert 0 < less_cache.cache_tokens < 4096
    quantized = fitted(model, total(model, cache_tokens=0) - 1).settings
    assert (quantized.kv_type, quantized.is_repacked, quantized.slots) == ("q8_0", True, 2)
    plain = fitted(model, total(model, cache_tokens=0, kv_type="q8_0") - 1).settings
    assert (plain.kv_type, plain.is_mapped, plain.is_repacked, plain.slots) == ("q8_0", True, False, 2)
    single = fitted(model, total(model, **SMALL) - 1).settings
    assert (single.slots, single.context_tokens) == (1, 2048)
    short = fitted(model, total(model, **SMALL, slots=1) - 1).settings
    assert (short.slots, short.context_tokens) == (1, 1024)
    shortest = fitted(model, total(model, **SMALL, slots=1, context_tokens=512)).settings
    assert (shortest.slots, shortest.context_tokens) == (1, 512)
    named = [note.partition(":")[0] for note in shortest.notes]
    assert sorted(named) == ["cache_tokens", "context_tokens", "kv_type", "repack", "slots"]
    assert all("MiB" in note and "instead of" in note for note in shortest.notes)
    with pytest.raises(EnvironmentIncomplete, match="does not fit"):
        fitted(model, total(model, **SMALL, slots=1, context_tokens=512) - 1)


def test_documents_are_read_by_themselves_where_there_is_place_to_put_them_together(model: ModelToLoad) -> None:
    whole = total(model, is_stitching=True)
    stitching = fitted(model, whole, documents="stitched", document_reread_tokens=8).settings
    assert stitching.reread_tokens == 8
    assert any("not proven for this model" in note for note in stitching.notes)
    exact = fitted(model, whole - 1, documents="stitched").settings
    assert (exact.reread_tokens, exact.cache_tokens) == (None, 4096)
    assert any("documents read by themselves: off instead of on" in note for note in exact.notes)
    for setting in ({"kv_type": "q8_0"}, {"cache_tokens": 0}):
        settings = fitted(model, 10 * whole, documents="stitched", **setting).settings
        assert settings.reread_tokens is None
        assert any("documents: read in their place" in note for note in settings.notes)


def test_documents_are_read_by_themselves_as_far_as_that_is_proven(model: ModelToLoad) -> None:
    whole = 2 * total(model, is_stitching=True)
    proven = dataclasses.replace(model, proven_reread_tokens=8)
    settings = fitted(proven, whole).settings
    assert settings.reread_tokens == 8
    assert any("its first 8 tokens where it stands, as proven for this model with 8" in note for note in settings.notes)
    assert fitted(proven, whole, document_reread_tokens=32).settings.reread_tokens == 32
    assert fitted(proven, whole, documents="exact").settings.reread_tokens is None
    less = fitted(proven, whole, documents="stitched").settings
    assert less.reread_tokens == 0
    assert any("not proven for this model" in note for note in less.notes)
    with_adapter = dataclasses.replace(proven, adapters={"other": model.path})
    settings = fitted(with_adapter, whole).settings
    assert settings.reread_tokens is None
    assert any("says nothing of its adapters" in note for note in settings.notes)
    assert fitted(model, whole).settings.reread_tokens is None


def test_nothing_is_stepped_down_to_read_documents_as_is_proven(model: ModelToLoad) -> None:
    proven = dataclasses.replace(model, proven_reread_tokens=0)
    free = total(model)
    without, found = fitted(model, free), fitted(proven, free)
    assert found.is_as_asked == without.is_as_asked
    notes = [note for note in found.settings.notes if "MiB are lacking" in note]
    assert len(notes) == 1
    plain = [note for note in found.settings.notes if note not in notes]
    assert msgspec.structs.replace(found.settings, notes=()) == msgspec.structs.replace(without.settings, notes=())
    assert plain == list(without.settings.notes)


def test_what_was_set_explicitly_is_refused_rather_than_changed(model: ModelToLoad) -> None:
    free = total(model, slots=1, context_tokens=512, cache_tokens=0, kv_type="q8_0")
    everything = ("slots", "context_tokens", "cache_tokens", "kv_type", "mmap", "repack")
    with pytest.raises(EnvironmentIncomplete) as caught:
        fitted(model, free, *everything, kv_type="f16", mmap="on", repack="on")
    message = str(caught.value)
    assert f"{round(free / MIB)} MiB are free" in message
    assert "2 slots of 2048 tokens" in message
    assert "context_tokens, kv_type, mmap, repack, slots" in message
    kept = fitted(model, total(model, **SMALL) - 1, "context_tokens").settings
    assert (kept.context_tokens, kept.slots) == (2048, 1)


def test_a_step_that_saves_nothing_is_not_taken(model: ModelToLoad) -> None:
    """Unmapped, plain weights take as much memory as repacked ones."""
    free = total(model, cache_tokens=0, kv_type="q8_0") - 1
    settings = fitted(model, free, mmap="off").settings
    assert (settings.is_mapped, settings.is_repacked, settings.slots) == (False, True, 1)


def test_memory_of_other_models_and_the_budget(model: ModelToLoad) -> None:
    alone = plan(model, Serve(), ROOMY)
    beside = plan(model, Serve(), ROOMY, others=[alone.memory])
    assert alone.free_bytes - beside.free_bytes == alone.memory.weights_file_bytes
    budget = 2 * alone.memory.total_bytes // MIB
    limited = plan(model, Serve(memory_mib=budget), ROOMY, others=[alone.memory])
    assert limited.free_bytes == budget * MIB - alone.memory.total_bytes
    assert limited.memory.total_bytes <= limited.free_bytes
    with pytest.raises(EnvironmentIncomplete, match="memory_mib = 1 for all"):
        plan(model, Serve(memory_mib=1), ROOMY)


def test_the_context_is_no_longer_than_trained(model: ModelToLoad) -> None:
    settings = plan(model, Serve(context_tokens=9000), ROOMY, explicit={"context_tokens"}).settings
    assert settings.context_tokens == 4096
    assert "4096 instead of 9000" in settings.notes[0]


def test_more_threads_than_cores_are_kept_and_told(model: ModelToLoad) -> None:
    settings = plan(model, Serve(threads=16), ROOMY).settings
    assert settings.threads_decode == 16
    assert "4 cores may be used" in settings.notes[0]


def test_a_head_that_cannot_be_quantized(tmp_path: Path) -> None:
    odd = to_load(shaped_gguf.write(tmp_path / "odd.gguf", dataclasses.replace(SHAPE, layers=1, head_width=48)))
    with pytest.raises(EnvironmentIncomplete, match="multiples of 32"):
        plan(odd, Serve(kv_type="q8_0"), ROOMY)
    free = predict(odd.header, Choice(slots=1, context_tokens=512, **{**SMALL, "kv_type": "f16"}), X86).total_bytes
    assert fitted(odd, free).settings.kv_type == "f16"


def test_an_adapter_takes_memory(model: ModelToLoad, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter.gguf"
    adapter.write_bytes(bytes(3 * MIB))
    with_adapter = plan(dataclasses.replace(model, adapters={"polite": adapter}), Serve(), ROOMY)
    assert with_adapter.memory.adapter_bytes == 3 * MIB
    assert with_adapter.settings.adapters == {"polite": str(adapter)}


@given(free_mib=st.integers(1, 400), explicit=st.sets(st.sampled_from(["slots", "context_tokens", "cache_tokens"])))
def test_a_plan_never_exceeds_what_is_free(model: ModelToLoad, free_mib: int, explicit: set[str]) -> None:
    asked = Serve(slots=3, context_tokens=3000, cache_tokens=5000)
    try:
        made = plan(model, asked, with_free(free_mib * MIB), explicit=explicit)
    except EnvironmentIncomplete:
        assert free_mib < 140
        return
    assert made.memory.total_bytes <= made.free_bytes == free_mib * MIB
    settings = made.settings
    assert 1 <= settings.slots <= 3
    assert 512 <= settings.context_tokens <= 3000
    assert settings.cells == settings.slots * settings.context_tokens
    cache = settings.cache_tokens
    assert 0 <= cache <= 5000
    kept = {"slots": settings.slots, "context_tokens": settings.context_tokens, "cache_tokens": cache}
    assert all(kept[name] == getattr(asked, name) for name in explicit)


def test_which_weights_are_repacked(tmp_path: Path) -> None:
    shape = Shape(layers=2, vocabulary=1000)
    q4 = to_load(shaped_gguf.write(tmp_path / "q4.gguf", shape)).header
    q8 = to_load(
        shaped_gguf.write(tmp_path / "q8.gguf", dataclasses.replace(shape, kind=gguf.GGMLQuantizationType.Q8_0))
    ).header
    tied = to_load(shaped_gguf.write(tmp_path / "tied.gguf", dataclasses.replace(shape, is_tied=True))).header
    embedding = next(tensor.size_bytes for tensor in q4.tensors if tensor.name == "token_embd.weight")
    matrices = sum(tensor.size_bytes for tensor in q4.tensors if len(tensor.shape) == 2) - embedding

    def copied(header: gguf_file.GgufHeader, features: set[str]) -> int:
        return predict(
            header, Choice(slots=1, context_tokens=512, **{**SMALL, "is_repacked": True}), features
        ).weights_copied_bytes

    assert copied(q4, {"avx2"}) == copied(q4, {"asimddp"}) == matrices
    assert copied(q4, {"sse4_2"}) == copied(q8, {"avx2"}) == 0
    assert copied(q8, {"asimddp"}) > 0
    assert copied(tied, {"avx2"}) == matrices, "the embedding, in its part as the output"


SIMULATE = """
import ctypes, json, re, sys
from llama_cpp import llama_cpp as c
from appliance.serving.decoder import batch_tokens
from appliance.serving.memory_prediction import Choice, output_rows
from appliance.serving.llama.library import KV_TYPES

found = []

@c.llama_log_callback
def keep(level, text, data):
    found.extend(re.findall(rb"compute buffer size = +([0-9.]+) MiB", text))

path, choices = json.loads(sys.stdin.read())
c.llama_log_set(keep, ctypes.c_void_p(0))
model = c.llama_model_default_params()
model.no_alloc, model.load_mode = True, c.LLAMA_LOAD_MODE_NONE
model = c.llama_model_load_from_file(path.encode(), model)
for each in choices:
    choice, params = Choice(**each), c.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.kv_unified = choice.cells, choice.slots, False
    params.n_batch = params.n_ubatch = batch_tokens(choice.slots, choice.chunk_tokens)
    params.n_outputs_max, params.flash_attn_type = output_rows(choice), c.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.type_k = params.type_v = KV_TYPES[choice.kv_type]
    c.llama_free(c.llama_init_from_model(model, params))
print(json.dumps([float(mebibytes) for mebibytes in found]))
"""


@pytest.mark.parametrize(
    "shape",
    [
        Shape(layers=28, hidden=1024, feed_forward=3072, heads=16, kv_heads=8, head_width=128, vocabulary=151_936),
        Shape(layers=28, hidden=2048, feed_forward=6144, heads=16, kv_heads=8, head_width=128, vocabulary=32_000),
        Shape(layers=36, hidden=2560, feed_forward=9728, heads=32, kv_heads=8, head_width=128, vocabulary=32_000),
    ],
    ids=["0.6B", "1.7B", "4B"],
)
def test_the_graph_takes_what_llama_cpp_says(tmp_path: Path, shape: Shape) -> None:
    """llama.cpp lays out its graph for models of real shape without loading them. Multiplications are not in its figure."""
    path = shaped_gguf.write_hollow(tmp_path / "model.gguf", dataclasses.replace(shape, is_tied=True))
    kinds = [
        {},
        {"slots": 1, "cache_tokens": 0},
        {"slots": 8, "context_tokens": 2304},
        {"slots": 4, "context_tokens": 8192},
        {"kv_type": "q8_0"},
        {"chunk_tokens": 64},
        {"chunk_tokens": 512},
    ]
    plain: dict[str, Any] = {"slots": 2, "context_tokens": 2048, "cache_tokens": 4096, "kv_type": "f16"}
    choices = [{**plain, "is_mapped": False, "is_repacked": True, **kind} for kind in kinds]
    result = subprocess.run(
        [sys.executable, "-c", SIMULATE], input=json.dumps([str(path), choices]), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    header = gguf_file.read_metadata(path)
    for choice, mebibytes in zip([Choice(**each) for each in choices], json.loads(result.stdout), strict=True):
        tokens = compute_tokens(header, choice)
        predicted = compute_bytes(header, choice, tokens, output_rows(choice))
        work = tokens * shape.feed_forward * WORK_VALUE_BYTES
        assert predicted - work == pytest.approx(mebibytes * MIB, rel=0.1), choice


MEASURE = """
import json, sys
from pathlib import Path
import msgspec
from appliance.serving.decoder import Feed
from appliance.serving.engine_settings import EngineSettings
from appliance.serving.llama import Context, Model, library
from appliance.serving.requests import SamplingSettings

def resident():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {name: int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}

library.start()
before = resident()
settings = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineSettings)
model = Model(Path(settings.model_path), is_mapped=settings.is_mapped, is_repacked=settings.is_repacked)
context = Context(model, settings)
context.start(0, SamplingSettings(), None, None)
for start in range(0, 1024, 256):
    context.decode([Feed(0, [65] * 256, start, True)], None)
after = resident()
print(json.dumps({name: after[name] - before[name] for name in after}))
"""


@pytest.mark.parametrize(
    ("is_tied", "is_mapped", "is_repacked", "kv_type"),
    [(True, True, True, "f16"), (False, True, False, "f16"), (True, False, True, "q8_0"), (False, False, False, "q8_0")],
)
def test_the_prediction_is_what_a_process_takes(
    tmp_path: Path, is_tied: bool, is_mapped: bool, is_repacked: bool, kv_type: Any
) -> None:
    """Within 5 %, or 3 MiB of small things; Python is there before, and no answer is bound to a grammar, nor kept."""
    path = shaped_gguf.write(tmp_path / "model.gguf", dataclasses.replace(SHAPE, is_tied=is_tied))
    asked = Serve(
        context_tokens=4096,
        cache_tokens=0,
        kv_type=kv_type,
        mmap="on" if is_mapped else "off",
        repack="on" if is_repacked else "off",
    )
    made = plan(to_load(path), asked, dataclasses.replace(ROOMY, cpu_features=device.cpu_features()))
    result = subprocess.run(
        [sys.executable, "-c", MEASURE],
        input=msgspec.json.encode(made.settings),
        capture_output=True,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
        check=False,
    )
    assert result.returncode == 0, result.stderr.decode()
    measured = json.loads(result.stdout)
    not_here = PROCESS_BYTES + SHAPE.vocabulary * ANSWER_TOKEN_BYTES + made.memory.cache_bytes
    anonymous = made.memory.anonymous_bytes - not_here
    assert measured["RssAnon"] == pytest.approx(anonymous, rel=0.05, abs=3 * MIB)
    mapped = made.memory.weights_file_bytes + made.memory.weights_idle_bytes
    assert measured["RssFile"] == pytest.approx(mapped, rel=0.05, abs=3 * MIB)
