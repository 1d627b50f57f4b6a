"""Converts a model folder to GGUF with llama.cpp's own converter, the copy inside the pinned source distribution.

`python -m convert.to_gguf`, `appliance convert gguf`. The converter runs in a subprocess, without network. A tokenizer whose
hash it does not know is recognized by its structure; `convert.verify` then proves the choice on real token ids.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from appliance import artifacts, config
from appliance.artifacts import Plan
from appliance.console import Command, emit, human_bytes, json_option, note
from appliance.errors import ModelFileError
from convert import llama_cpp_source

REVISION = 1  # raised when the same inputs would give another file
TYPES = ("f16", "bf16", "f32")
# Split patterns of tokenizer.json, and the name under which llama.cpp implements them (src/llama-vocab.cpp).
PRE_TOKENIZERS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",  # noqa: E501
}


@click.command(cls=Command)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--type", "number_type", type=click.Choice(TYPES), default="f16", show_default=True)
@click.option("--name", help="Name of the result; default: the model folder's.")
@click.option("--check", is_flag=True, help="Only say whether this model's architecture can be converted.")
@click.option("--dry-run", is_flag=True, help="Say what would be made, and make nothing.")
@json_option
def gguf(model: Path, number_type: str, name: str | None, check: bool, dry_run: bool, as_json: bool) -> None:
    """Convert MODEL (a folder in the Hugging Face format) to one GGUF file."""
    if check:
        require_known_architecture(model)
        emit({"artifact": model, "state": "convertible"}, as_json, f"{model} (convertible)")
        return
    root = config.artifacts_root()
    plan = Plan(
        kind="gguf",
        name=f"{name or model.name}-{number_type.upper()}",
        inputs={"revision": REVISION, "llama_cpp_python": llama_cpp_source.VERSION},
        parents=[artifacts.identity(model)],
        config={"type": number_type.upper()},
    )
    state = "unchanged" if plan.existing(root) else "to make" if dry_run else "made"
    if state == "made":
        _make(plan, model, number_type, root)
    file = plan.location(root) / file_name(plan)
    emit({"artifact": plan.location(root), "file": file, "state": state}, as_json, f"{file} ({state})")


def file_name(plan: Plan) -> str:
    return f"{plan.name}.gguf"


def _make(plan: Plan, model: Path, number_type: str, root: Path) -> None:
    require_known_architecture(model)
    artifacts.check_input(model)
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    artifacts.require_space(root, weights + 50_000_000, "The GGUF file")
    with artifacts.create(plan, root) as draft:
        target = draft.path / file_name(plan)
        run_converter(model, target, number_type)
        draft.results.update(size_bytes=target.stat().st_size, pre_tokenizer=pre_tokenizer(model))
        note(f"gguf: {target.name}, {human_bytes(target.stat().st_size)}")


def run_converter(model: Path, target: Path, number_type: str) -> None:
    """Runs the pinned converter; raises `ModelFileError` with its own last words when it fails."""
    arguments = [str(model), "--outfile", str(target), "--outtype", number_type]
    command = [
        sys.executable,
        "-m",
        "convert.upstream",
        str(llama_cpp_source.converter_dir()),
        pre_tokenizer(model) or "-",
    ]
    result = subprocess.run(
        [*command, *arguments],
        env=config.quiet_environment(),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if result.returncode != 0 or not target.is_file():
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        raise ModelFileError(f"{model} was not converted: {' | '.join(lines[-3:]) or 'the converter gave no reason'}")


def pre_tokenizer(model: Path) -> str | None:
    """llama.cpp's name for the tokenizer's split pattern, when the pattern is one that it implements."""
    path = model / "tokenizer.json"
    if not path.is_file():
        return None
    patterns = _split_patterns(json.loads(path.read_text(encoding="utf-8")).get("pre_tokenizer") or {})
    return PRE_TOKENIZERS.get(patterns[0]) if len(patterns) == 1 else None


def require_known_architecture(model: Path) -> None:
    """Raises `ModelFileError` when the pinned converter does not know the model's architecture."""
    path = model / "config.json"
    if not path.is_file():
        raise ModelFileError(f"{model} has no config.json, so it is no model in the Hugging Face format.")
    try:
        names = json.loads(path.read_text(encoding="utf-8")).get("architectures") or []
    except (ValueError, AttributeError) as error:
        raise ModelFileError(f"{path} is not a JSON object: {error}.") from error
    table = (llama_cpp_source.converter_dir() / "conversion" / "__init__.py").read_text(encoding="utf-8")
    known = set(re.findall(r'^\s+"(\w+)":\s+"\w+"', table, re.MULTILINE))
    if not known.intersection(names):
        like = ", ".join(sorted(name for name in known if name.startswith(("Qwen", "Llama", "Mistral", "Gemma"))))
        raise ModelFileError(f"Architecture {names or 'unnamed'} cannot be converted to GGUF; among the known ones: {like}.")


def _split_patterns(node: Any) -> list[str]:
    if node.get("type") == "Sequence":
        return [pattern for child in node["pretokenizers"] for pattern in _split_patterns(child)]
    pattern = node.get("pattern", {}).get("Regex")
    return [pattern] if pattern else []


if __name__ == "__main__":
    gguf()
