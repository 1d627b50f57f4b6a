"""Quantizes a GGUF file with llama.cpp's own call: `python -m convert.quantize`, `appliance convert quantize`."""

import ctypes
import threading
from pathlib import Path

import click

from appliance import artifacts, config, device, llama_backends
from appliance.artifacts import Plan
from appliance.console import Command, emit, human_bytes, json_option, note
from appliance.errors import ModelFileError
from convert import llama_cpp_source

REVISION = 1  # raised when the same input would give another file
# llama_ftype of include/llama.h
TYPES = {"Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}


@click.command(cls=Command)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--type", "quantization", type=click.Choice(list(TYPES)), default="Q4_K_M", show_default=True)
@click.option("--name", help="Name of the result; default: the file's, without its number type.")
@click.option("--dry-run", is_flag=True, help="Say what would be made, and make nothing.")
@json_option
def quantize(model: Path, quantization: str, name: str | None, dry_run: bool, as_json: bool) -> None:
    """Quantize MODEL, a 16-bit GGUF file or its artifact folder."""
    root = config.artifacts_root()
    source = model if model.suffix == ".gguf" else model / f"{model.name[:-13]}.gguf"
    folder = source.parent if (source.parent / artifacts.MANIFEST).exists() or model.suffix != ".gguf" else source
    stem = name or source.stem.removesuffix("-F16").removesuffix("-BF16").removesuffix("-F32")
    plan = Plan(
        kind="gguf",
        name=f"{stem}-{quantization}",
        inputs={"revision": REVISION, "llama_cpp_python": llama_cpp_source.VERSION},
        parents=[artifacts.identity(folder)],
        config={"type": quantization},
    )
    file = plan.location(root) / f"{plan.name}.gguf"
    state = "unchanged" if plan.existing(root) else "to make" if dry_run else "made"
    if state == "made":
        if not source.is_file():
            raise ModelFileError(f"{source} does not exist; name a GGUF file or the folder of one.")
        artifacts.check_input(source)
        artifacts.require_space(root, source.stat().st_size, "The quantized file")
        with artifacts.create(plan, root) as draft:
            target = draft.path / file.name
            quantize_file(source, target, quantization)
            draft.results.update(size_bytes=target.stat().st_size)
            sizes = f"{human_bytes(source.stat().st_size)} to {human_bytes(target.stat().st_size)}"
            note(f"quantize: {target.name}, {sizes}")
    emit({"artifact": plan.location(root), "file": file, "state": state}, as_json, f"{file} ({state})")


def quantize_file(source: Path, target: Path, quantization: str, *, is_requantized: bool = False) -> None:
    """Writes `target`; raises `ModelFileError` with llama.cpp's last words when it refuses.

    `is_requantized` allows a source that is quantized already, which is good for measuring speed and for nothing else.
    """
    from llama_cpp import llama_cpp as c

    lines: list[str] = []

    @c.llama_log_callback  # type: ignore[untyped-decorator, unused-ignore]
    def keep(_level: int, text: bytes, _data: ctypes.c_void_p) -> None:
        lines.append(text.decode(errors="replace").strip())

    c.llama_log_set(keep, ctypes.c_void_p(0))
    llama_backends.load(c)
    parameters = c.llama_model_quantize_default_params()
    parameters.ftype = TYPES[quantization]
    parameters.nthread = device.usable_cores()
    parameters.allow_requantize = is_requantized
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
    if status != [0] or not target.is_file():
        reason = next((line for line in reversed(lines) if line), "llama.cpp gave no reason")
        raise ModelFileError(f"{source} was not quantized to {quantization}: {reason}")


if __name__ == "__main__":
    quantize()
