"""llama.cpp's own quantization call, in this process: which types there are, how large a file would be, and the work itself.

Source: include/llama.h (`llama_model_quantize_params`) of the pinned llama.cpp.
"""

import ctypes
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from appliance import artifacts, device, gguf_types, llama_backends
from appliance.errors import ModelFileError

# In the order in which quality falls. Two of llama_ftype are left out: they need a mixture of experts or cards of one maker.
NAMES = (
    *("F32", "BF16", "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "IQ4_NL"),
    *("Q4_0", "IQ4_XS", "Q3_K_L", "Q3_K_M", "IQ3_M", "IQ3_S", "Q3_K_S", "IQ3_XS", "IQ3_XXS", "Q2_K", "IQ2_M", "Q2_K_S"),
    *("IQ2_S", "IQ2_XS", "Q2_0", "TQ2_0", "IQ2_XXS", "IQ1_M", "TQ1_0", "IQ1_S", "Q1_0"),
)
TYPES = {name: number for name in NAMES for number, found in gguf_types.FILE_TYPES.items() if found == name}
# Of single tensors, for a recipe that names some of them.
SINGLE = (
    *("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K"),
    "Q2_K",
)
TENSOR_TYPES = {name: number for number, (name, *_) in gguf_types.TENSOR_TYPES.items() if name in SINGLE}
BUFFER_BYTES = 1 << 29  # of rows in memory at a time; llama.cpp's own default is 8 GiB
# One line for each tensor in a dry run: its name, and the type that it would get where that is another one.
DRY_LINE = re.compile(r"^\[ *\d+/ *\d+\] +(\S+) +- \[.*?\], type = +(\w+), .*?(?:\((\w+)\))?$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a file is quantized: its type, means of input columns by tensor (imatrix), and types by regular expression."""

    type: str
    imatrix: Mapping[str, Any] = field(default_factory=dict)
    overrides: Sequence[tuple[str, str]] = ()
    is_requantized: bool = False  # a source that is quantized already: good for measuring speed and for nothing else


def quantize_file(source: Path, target: Path, settings: Settings) -> None:
    """Writes `target`; raises `ModelFileError` with llama.cpp's last words when it refuses.

    A disk that fills up meanwhile raises `EnvironmentIncomplete`.
    """
    lines = _call(source, target, settings, is_dry=False)
    if not target.is_file():
        raise ModelFileError(f"{source} was not quantized to {settings.type}: {lines[-1] if lines else 'no reason given'}")


def tensor_types(source: Path, settings: Settings) -> dict[str, str]:
    """The type that each tensor would get, by its name, without quantizing anything; raises `ModelFileError`."""
    found = {}
    text = "".join(_call(source, source.with_suffix(".none"), settings, is_dry=True))
    for line in re.split(r"(?=\[ *\d+/ *\d+\])|\n", text):
        if (match := DRY_LINE.match(line.strip())) is not None:
            found[match[1]] = (match[3] or match[2]).upper()
    return found


def _call(source: Path, target: Path, settings: Settings, *, is_dry: bool) -> list[str]:
    from llama_cpp import llama_cpp as c

    lines: list[str] = []

    @c.llama_log_callback  # type: ignore[untyped-decorator, unused-ignore]
    def keep(_level: int, text: bytes, _data: ctypes.c_void_p) -> None:
        lines.append(text.decode(errors="replace"))

    c.llama_log_set(keep, ctypes.c_void_p(0))
    llama_backends.load(c)
    parameters = c.llama_model_quantize_default_params()
    parameters.ftype = TYPES[settings.type]
    parameters.nthread = device.usable_cores()
    parameters.allow_requantize = settings.is_requantized
    parameters.dry_run = is_dry
    parameters.max_buf_size = BUFFER_BYTES
    held = _give(c, parameters, settings)  # llama.cpp holds pointers into it only
    status: list[int] = []

    def work() -> None:
        status.append(c.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)))

    # In a thread of its own, because a signal is handled only between Python instructions of the main thread.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.2)
    finally:
        c.llama_log_set(c.llama_log_callback(), ctypes.c_void_p(0))  # `keep` goes with this function
    del held
    if status != [0]:
        if not is_dry:
            artifacts.require_not_full(target)
        reason = next((line.strip() for line in reversed(lines) if line.strip()), "llama.cpp gave no reason")
        raise ModelFileError(f"{source} was not quantized to {settings.type}: {reason}")
    return lines


def _give(c: Any, parameters: Any, settings: Settings) -> list[Any]:
    """Puts the importance matrix and the overrides into the parameters, as C arrays that end with an empty entry."""
    held: list[Any] = []
    if settings.imatrix:
        entries = (c.llama_model_imatrix_data * (len(settings.imatrix) + 1))()
        for entry, (name, means) in zip(entries, settings.imatrix.items(), strict=False):
            numbers = (ctypes.c_float * len(means)).from_buffer_copy(means.astype("float32").tobytes())
            entry.name, entry.data, entry.size = name.encode(), numbers, len(means)
            held.append(numbers)
        parameters.imatrix = entries
        held.append(entries)
    if settings.overrides:
        patterns = (c.llama_model_tensor_override * (len(settings.overrides) + 1))()
        for entry, (pattern, kind) in zip(patterns, settings.overrides, strict=False):
            entry.pattern, entry.type = pattern.encode(), TENSOR_TYPES[kind]
        parameters.tt_overrides = patterns
        held.append(patterns)
    return held
