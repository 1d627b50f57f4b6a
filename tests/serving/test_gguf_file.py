"""Headers of GGUF files: what sound ones say, and that a hostile one costs nothing but a `ModelFileError`."""

import os
import tracemalloc
import types
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_cpp import llama_cpp as c

from appliance import gguf_types
from appliance.errors import ModelFileError
from appliance.serving import gguf_file
from appliance.serving.gguf_file import GgufHeader, Skipped
from tests import tiny_gguf
from tests.serving import gguf_bytes
from tests.serving.gguf_bytes import array, mutant, tensor, text, u32

HUGE = 2**64 - 1


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for examples, each written over the last."""
    return tmp_path_factory.mktemp("fuzz") / "model.gguf"


def read(path: Path, content: bytes) -> GgufHeader:
    path.write_bytes(content)
    return gguf_file.read_metadata(path)


def refused(path: Path, content: bytes) -> str:
    with pytest.raises(ModelFileError) as error:
        read(path, content)
    return str(error.value).removeprefix(str(path))


def test_sound_model(tiny: Path) -> None:
    header = gguf_file.check(tiny)
    assert (header.architecture, header.name, header.kind, header.quantization) == ("qwen3", "tiny", "model", "F32")
    assert (header.block_count, header.context_length) == (tiny_gguf.LAYERS, tiny_gguf.CONTEXT_TOKENS)
    assert header.embedding_length == tiny_gguf.HIDDEN
    assert header.head_counts == (tiny_gguf.HEADS,) * tiny_gguf.LAYERS
    assert header.kv_head_counts == (tiny_gguf.KV_HEADS,) * tiny_gguf.LAYERS
    assert header.key_length == header.value_length == tiny_gguf.HEAD_WIDTH
    assert header.vocabulary_tokens == len(tiny_gguf.vocabulary())
    assert header.values["tokenizer.ggml.tokens"] == Skipped("string", header.vocabulary_tokens)
    assert header.values["tokenizer.chat_template"] == tiny_gguf.CHATML
    assert header.has_chat_template
    assert header.pooling_type is None
    assert header.data_start + header.tensor_bytes == header.size_bytes == tiny.stat().st_size
    assert dict(header.tensor_bytes_by_type) == {"F32": header.tensor_bytes}
    assert len(header.tensors) == 3 + 11 * tiny_gguf.LAYERS


def test_everything_the_reference_writer_can_write_is_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "bert")
    writer.add_type("adapter")
    writer.add_custom_alignment(256)
    writer.add_pooling_type(gguf.PoolingType.RANK)
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_head_count([4, 8])
    writer.add_head_count_kv([0, 2])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    for kind, value in (
        ("uint8", 1),
        ("int8", -1),
        ("uint16", 2),
        ("int16", -2),
        ("int32", -3),
        ("uint64", 4),
        ("int64", -4),
    ):
        getattr(writer, f"add_{kind}")(f"x.{kind}", value)
    writer.add_float32("x.float32", 0.5)
    writer.add_float64("x.float64", 0.25)
    writer.add_bool("x.bool", True)
    writer.add_array("x.floats", [0.5, 1.5])
    writer.add_array("x.flags", [True, False])
    writer.add_array("x.long", list(range(5000)))
    writer.add_string("x.long text", "ж" * (1 << 20))
    writer.add_tensor("one", np.zeros((3, 64), dtype=np.float32))
    writer.add_tensor("two", np.zeros((3, 34), dtype=np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = gguf_file.read_metadata(tmp_path / "m.gguf")
    assert (header.pooling_type, header.quantization, header.file_type) == ("rank", "Q4_K_M", 15)
    assert (header.head_counts, header.kv_head_counts, header.key_length) == ((4, 8), (0, 2), 8)
    assert header.data_start % 256 == 0
    assert {key.removeprefix("x."): value for key, value in header.values.items() if key.startswith("x.")} == {
        **{"uint8": 1, "int8": -1, "uint16": 2, "int16": -2, "int32": -3, "uint64": 4, "int64": -4},
        **{"float32": 0.5, "float64": 0.25, "bool": True, "floats": (0.5, 1.5), "flags": (True, False)},
        **{"long": Skipped("int32", 5000), "long text": Skipped("string", 1 << 21)},
    }
    assert [(each.name, each.type, each.shape, each.size_bytes) for each in header.tensors] == [
        ("one", "F32", (64, 3), 768),
        ("two", "Q8_0", (32, 3), 102),
    ]
    assert header.is_adapter
    with pytest.raises(ModelFileError, match="is a LoRA adapter"):
        gguf_file.check(tmp_path / "m.gguf")


def test_types_are_those_of_the_library() -> None:
    for number, (name, block_values, block_bytes) in gguf_types.TENSOR_TYPES.items():
        library = c._lib
        library.ggml_type_name.restype = c.ctypes.c_char_p
        library.ggml_type_size.restype = c.ctypes.c_size_t
        library.ggml_blck_size.restype = c.ctypes.c_int64
        assert library.ggml_type_name(number).decode().lower() == name.lower()
        assert (library.ggml_blck_size(number), library.ggml_type_size(number)) == (block_values, block_bytes), name
    assert {name for name, _, _ in gguf_types.TENSOR_TYPES.values()} >= {each.name for each in gguf.GGMLQuantizationType}
    for kind in gguf.LlamaFileType:
        name = kind.name.removeprefix("MOSTLY_").removeprefix("ALL_")
        assert gguf_types.FILE_TYPES.get(kind.value, name) == name or kind.name == "GUESSED"
    assert {kind.value for kind in gguf.GGUFValueType} == {*gguf_types.SCALARS, gguf_types.STRING, gguf_types.ARRAY}


def test_minimal_file(scratch: Path) -> None:
    header = read(scratch, gguf_bytes.file())
    assert (header.architecture, header.quantization, header.head_counts) == ("llama", "F32", ())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is no GGUF file"),
        (b"PK\3\4 something else", "is no GGUF file"),
        (b"GGUF", "is truncated"),
        (gguf_bytes.file(version=1), "is GGUF version 1;"),
        (gguf_bytes.file(version=4), "is GGUF version 4;"),
        (gguf_bytes.file(version=0x03000000), "big-endian"),
        (gguf_bytes.file(tensors=[]), "holds no tensors"),
        (gguf_bytes.file(data=127), "its last tensor ends at"),
        (gguf_bytes.file(counts={"pairs": HUGE}), f"{HUGE} metadata values, the limit is"),
        (gguf_bytes.file([text("a", "b")], counts={"pairs": 60000})[:-128], "is empty or there twice"),
        (gguf_bytes.file(counts={"tensors": HUGE}), f"{HUGE} tensors, the limit is"),
        (gguf_bytes.file([u32("", 1)]), "is empty or there twice"),
        (gguf_bytes.file([u32("a", 1), u32("a", 1)]), "'a' is empty or there twice"),
        (gguf_bytes.file([u32("k" * 2000, 1)]), "a name of 2000 bytes"),
        (gguf_bytes.file([gguf_bytes.pair("a", 13, b"")]), "unknown type 13"),
        (gguf_bytes.file([array("a", 9, 1)]), "an array of values of the unknown type 9"),
        (gguf_bytes.file([array("a", 8, HUGE)]), f"an array of {HUGE} strings"),
        (gguf_bytes.file([array("a", 0, HUGE)]), "is truncated"),
        (gguf_bytes.file([u32("general.alignment", 0)]), "no power of 2"),
        (gguf_bytes.file([u32("general.alignment", 48)]), "no power of 2"),
        (gguf_bytes.file([text("general.alignment", "32")]), "no power of 2"),
        (gguf_bytes.file([u32("split.count", 3)]), "one of 3 parts"),
        (gguf_bytes.file([u32("llama.block_count", 513)]), "llama.block_count is 513"),
        (gguf_bytes.file([text("llama.block_count", "2")]), "llama.block_count is 2, no whole number"),
        (gguf_bytes.file([u32("llama.pooling_type", 5)]), "llama.pooling_type is 5"),
        (gguf_bytes.file([u32("general.name", 5)]), "general.name is 5, no text"),
        (
            gguf_bytes.file([u32("llama.block_count", 2), array("llama.attention.head_count", 4, 1, b"\1\0\0\0")]),
            "1 numbers for 2",
        ),
        (gguf_bytes.file(tensors=[tensor("n" * 64)]), "a name of 64 bytes"),
        (gguf_bytes.file(tensors=[tensor(), tensor()]), "'t' is there twice"),
        (gguf_bytes.file(tensors=[tensor(shape=(1, 1, 1, 1, 1))]), "5 dimensions"),
        (gguf_bytes.file(tensors=[tensor(shape=(0,))]), "impossible shape"),
        (gguf_bytes.file(tensors=[tensor(shape=(2**40, 2**40))]), "impossible shape"),
        (gguf_bytes.file(tensors=[tensor(shape=(33,), kind=8)]), "impossible shape"),
        (gguf_bytes.file(tensors=[tensor(kind=4)]), "unknown type 4"),
        (gguf_bytes.file(tensors=[tensor(offset=1)]), "no multiple of 32"),
        (gguf_bytes.file(tensors=[tensor(offset=2**63)]), "its last tensor ends at"),
    ],
)
def test_lies_are_named(scratch: Path, content: bytes, said: str) -> None:
    assert said in refused(scratch, content)


def test_file_without_an_architecture(scratch: Path) -> None:
    content = gguf_bytes.file().replace(b"general.architecture", b"general.architectur_")
    assert "general.architecture is missing" in refused(scratch, content)


def test_every_cut_is_noticed(tiny: Path, scratch: Path) -> None:
    whole, header = tiny.read_bytes(), gguf_file.read_metadata(tiny)
    for end in [*range(0, header.data_start, 7), *range(header.data_start, len(whole), 9973), len(whole) - 1]:
        assert "is truncated" in refused(scratch, whole[:end]) or end < 4


def test_file_that_shrinks_while_it_is_read(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch.write_bytes(gguf_bytes.file()[:60])
    before = types.SimpleNamespace(st_mode=scratch.stat().st_mode, st_size=10_000)
    monkeypatch.setattr(os, "fstat", lambda _: before)
    with pytest.raises(ModelFileError, match="is truncated"):
        gguf_file.read_metadata(scratch)


def test_what_is_no_file(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.gguf"
    os.mkfifo(fifo)
    for path, said in ((tmp_path, "no regular file"), (fifo, "no regular file"), (Path("/dev/zero"), "no regular file")):
        with pytest.raises(ModelFileError, match=said):
            gguf_file.read_metadata(path)
    with pytest.raises(ModelFileError, match="does not exist"):
        gguf_file.read_metadata(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    "bomb",
    [
        gguf_bytes.file([array("a", 8, 1 << 22)], data=8 << 22),  # empty strings
        gguf_bytes.file([array(f"a{n}", 0, 1024, b"\0" * 1024) for n in range(6000)]),  # numbers that would be kept
        gguf_bytes.file([text(f"a{n}", "x" * 60_000) for n in range(600)]),  # strings that would be kept
        gguf_bytes.file([array("a", 12, 4_000_000, b"\0" * 32_000_000)]),
    ],
    ids=["strings", "numbers", "texts", "long array"],
)
def test_large_header_takes_little_memory(scratch: Path, bomb: bytes) -> None:
    scratch.write_bytes(bomb)
    tracemalloc.start()
    try:
        gguf_file.read_metadata(scratch)
        _, peak = tracemalloc.get_traced_memory()
    except ModelFileError:
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20


def survives(path: Path, content: bytes) -> bool:
    """Whether the file is taken; any other exception than `ModelFileError` fails the test."""
    try:
        header = read(path, content)
    except ModelFileError:
        return False
    assert header.data_start + max(each.offset + each.size_bytes for each in header.tensors) <= len(content)
    return True


@given(st.binary(max_size=400))
def test_noise(scratch: Path, noise: bytes) -> None:
    survives(scratch, b"GGUF" + noise)
    survives(scratch, gguf_bytes.file()[:24] + noise)


KEYS = (
    "general.alignment",
    "general.architecture",
    "llama.block_count",
    "llama.attention.head_count",
    "tokenizer.ggml.tokens",
)
PAIRS = st.builds(
    gguf_bytes.pair,
    st.sampled_from(KEYS) | st.text(max_size=8),
    st.integers(0, 13),
    st.binary(max_size=24) | st.integers(0, HUGE).map(lambda n: n.to_bytes(8, "little") * 2),
)
TENSORS = st.builds(
    tensor,
    st.text(max_size=8),
    st.lists(st.integers(0, HUGE) | st.integers(0, 64), max_size=5),
    st.integers(0, 50),
    st.integers(0, HUGE),
)


@given(st.lists(PAIRS, max_size=5), st.lists(TENSORS, max_size=3), st.integers(0, 300))
def test_any_fields(scratch: Path, pairs: Sequence[bytes], tensors: Sequence[bytes], data: int) -> None:
    survives(scratch, gguf_bytes.file(pairs, tensors, data=data))


def fuzz(tiny: Path, scratch: Path, seeds: range) -> int:
    sound, header_bytes = tiny.read_bytes(), gguf_file.read_metadata(tiny).data_start
    return sum(survives(scratch, mutant(sound, header_bytes, seed)) for seed in seeds)


def test_mutants(tiny: Path, scratch: Path) -> None:
    taken = fuzz(tiny, scratch, range(600))
    assert 0 < taken < 600, "some damage cannot be seen in a header, most can"


@pytest.mark.slow
def test_many_mutants(tiny: Path, scratch: Path) -> None:
    fuzz(tiny, scratch, range(600, 30_000))
