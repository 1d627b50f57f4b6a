"""How many layers go to the GPU, by what is free there; and that it is always told."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from appliance import gpu, gpu_access
from appliance.commands import serve
from appliance.errors import EnvironmentIncomplete
from appliance.gpu import Gpu
from appliance.recipe import Serve
from appliance.serving import gguf_file, gpu_layers, planning
from appliance.serving.gguf_file import GgufHeader
from appliance.serving.memory_plan import plan
from appliance.serving.memory_prediction import MIB, Choice, layer_bytes, predict
from appliance.serving.served_model import ServedModel
from tests import shaped_gguf
from tests.serving.test_memory_plan import ROOMY, to_load
from tests.shaped_gguf import Shape

SHAPE = Shape(layers=4, hidden=512, feed_forward=2048, heads=8, kv_heads=2, vocabulary=16000)
CHOICE = Choice(slots=2, context_tokens=1024, cache_tokens=0, kv_type="f16", is_mapped=True, is_repacked=False)
KV_OF_A_LAYER = 2048 * 2 * (64 + 64) * 2


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = dataclasses.replace(SHAPE, is_tied=request.param)
    return shaped_gguf.write(tmp_path_factory.mktemp("models") / "shaped.gguf", shape)


@pytest.fixture
def header(path: Path) -> GgufHeader:
    return gguf_file.read_metadata(path)


def card(free_bytes: int) -> Gpu:
    return Gpu(index=0, vendor="nvidia", name="T4", memory_total_bytes=1 << 34, memory_used_bytes=(1 << 34) - free_bytes)


def choose(header: GgufHeader, free_bytes: int, asked: int = -1, *, can_offload: bool = True) -> tuple[int, str]:
    """With so much memory for layers, after what the driver and computing take."""
    reserve = gpu_layers._reserve(header, CHOICE)
    return gpu_layers.choose(header, CHOICE, [card(free_bytes + reserve)], asked, can_offload=can_offload)


def needs(header: GgufHeader) -> list[int]:
    """From the output downward."""
    weights = layer_bytes(header)
    return [weights[4], *(each + KV_OF_A_LAYER for each in weights[3::-1])]


def test_as_many_as_fit(header: GgufHeader) -> None:
    sizes = needs(header)
    for layers in range(6):
        count, said = choose(header, sum(sizes[:layers]))
        assert count == layers
        assert f"gpu_layers: {layers} of 5" in said
        assert "GPU 0 (T4, " in said
        where = {0: "computing on CPU", 5: "computing on GPU"}.get(layers, "computing on GPU and CPU")
        assert f"{where};" in said
        if layers:
            assert choose(header, sum(sizes[:layers]) - 1)[0] == layers - 1


def test_what_was_asked_for_is_kept_or_refused(header: GgufHeader) -> None:
    sizes = needs(header)
    assert choose(header, sum(sizes), 2)[0] == 2
    assert choose(header, sum(sizes), 99)[0] == 5
    assert choose(header, sum(sizes), 0) == (0, "gpu_layers: 0 as set; " + str(card_of(header, sum(sizes))) + " left alone.")
    with pytest.raises(EnvironmentIncomplete, match=r"gpu_layers is 3, which needs \d+ MiB.* 2 layers fit"):
        choose(header, sum(sizes[:2]), 3)


def card_of(header: GgufHeader, free_bytes: int) -> Gpu:
    return card(free_bytes + gpu_layers._reserve(header, CHOICE))


def test_a_build_for_the_cpu_only_is_told(header: GgufHeader) -> None:
    count, said = choose(header, 1 << 30, can_offload=False)
    assert count == 0
    assert "BACKEND=cuda" in said
    with pytest.raises(EnvironmentIncomplete, match="compiled for the CPU or for other cards"):
        choose(header, 1 << 30, 3, can_offload=False)
    with pytest.raises(EnvironmentIncomplete, match="no GPU was found"):
        gpu_layers.choose(header, CHOICE, [], 1, can_offload=True)
    assert gpu_layers.choose(header, CHOICE, [], -1, can_offload=False) == (0, "")


def test_memory_of_several_cards_adds_up(header: GgufHeader) -> None:
    reserve = gpu_layers._reserve(header, CHOICE)
    half = card(sum(needs(header)) // 2 + 1 + reserve)
    assert gpu_layers.choose(header, CHOICE, [half, half], -1, can_offload=True)[0] == 5
    full = card(reserve // 2)
    assert gpu_layers.choose(header, CHOICE, [full, full], -1, can_offload=True)[0] == 0


def test_the_plan_moves_memory_to_the_gpu(path: Path) -> None:
    def made(**changes: Any) -> tuple[int, int, tuple[str, ...]]:
        planned = plan(to_load(path), Serve(), ROOMY, gpus=[card(8192 * MIB)], **changes)
        return planned.settings.gpu_layers, planned.memory.gpu_bytes, planned.settings.notes

    layers, on_gpu, notes = made(can_offload=True)
    header = gguf_file.read_metadata(path)
    assert layers == 5
    assert on_gpu == sum(layer_bytes(header)) + 4 * KV_OF_A_LAYER * 2, "cached prefixes are in the machine's memory"
    assert any("computing on GPU" in note for note in notes)
    assert made(can_offload=False)[:2] == (0, 0)


@pytest.mark.parametrize(("compiled", "layers"), [(None, 5), ("75-real", 5), ("80-real;86-real", 0)])
def test_no_layer_goes_to_a_card_that_the_image_has_no_code_for(
    compiled: str | None, layers: int, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "gpus", lambda: [dataclasses.replace(card(8192 * MIB), architecture="75")])
    monkeypatch.setattr(planning, "_can_offload", lambda: True)
    if compiled is not None:
        monkeypatch.setenv(gpu_access.ARCHITECTURES, compiled)
    header = gguf_file.read_metadata(path)
    served = ServedModel(name="shaped", path=path, sha256="ab" * 32, made_at=0, header=header, is_foreign=True)
    planner = planning.Planner(explicit=(), folder=tmp_path, machine=ROOMY)
    settings = planner.plan(served, Serve(), ()).settings
    assert settings.gpu_layers == layers
    assert any("compiled for the CPU or for other cards" in note for note in settings.notes) == (not layers)
    if not layers:
        with pytest.raises(EnvironmentIncomplete, match="gpu_layers is 3, but GPU 0"):
            planner.plan(served, Serve(gpu_layers=3), ())


def test_card_that_is_hidden_keeps_no_layer_from_the_others(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is its memory counted on."""
    old = dataclasses.replace(card(8192 * MIB), index=1, architecture="61")
    monkeypatch.setattr(gpu, "gpus", lambda: [dataclasses.replace(card(8192 * MIB), architecture="75"), old])
    monkeypatch.setattr(planning, "_can_offload", lambda: True)
    monkeypatch.setenv(gpu_access.ARCHITECTURES, "75-real")
    header = gguf_file.read_metadata(path)
    served = ServedModel(name="shaped", path=path, sha256="ab" * 32, made_at=0, header=header, is_foreign=True)
    planner = planning.Planner(explicit=(), folder=tmp_path, machine=ROOMY)
    assert planner.plan(served, Serve(), ()).settings.gpu_layers == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    settings = planner.plan(served, Serve(), ()).settings
    assert settings.gpu_layers == 5
    assert not any("GPU 1" in note for note in settings.notes)


@pytest.mark.parametrize(("vendors", "is_cpu"), [([], True), (["nvidia"], True), (["nvidia", "amd"], False)])
def test_what_computes_meanwhile_is_said_only_where_it_is_known(
    vendors: list[str], is_cpu: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_access, "vendors", lambda: vendors)
    monkeypatch.setattr(gpu, "problems", lambda: [gpu_access.Problem(what="A card is not used", remedy="use it")])
    serve._warn_of_cards()
    said = capsys.readouterr().err
    assert said.startswith("warning: A card is not used; use it.")
    assert ("Until then the CPU computes." in said) == is_cpu


def test_layers_on_the_gpu_leave_memory(header: GgufHeader) -> None:
    totals = [predict(header, dataclasses.replace(CHOICE, gpu_layers=layers), ()).total_bytes for layers in range(6)]
    assert totals == sorted(totals, reverse=True)
    on_gpu = [predict(header, dataclasses.replace(CHOICE, gpu_layers=layers), ()).gpu_bytes for layers in range(6)]
    assert on_gpu == [sum(needs(header)[:layers]) for layers in range(6)]
