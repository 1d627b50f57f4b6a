"""Other files of the same model: which there are, and how fast each is beside the one that is served.

Two files are of the same model when their layers have the same shape; what they answer is not compared.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from appliance import artifacts
from appliance.errors import ApplianceError
from appliance.serving import gguf_file
from appliance.serving.engine_settings import EngineSettings
from appliance.serving.gguf_file import GgufHeader
from appliance.serving.served_model import SUFFIX, ServedModel
from appliance.serving.speed import Progress, Rate, tokens_of
from appliance.serving.speed_meter import Task
from appliance.serving.tuning import Measure

ROUNDS = 3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OtherFile:
    """`remark` says where it is from. What `is_foreign` has no manifest, and is to be tried before it is loaded."""

    quantization: str
    path: Path
    size_bytes: int
    remark: str
    is_foreign: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FileSpeed:
    file: OtherFile
    reading: Rate
    writing: Rate


def siblings(model: ServedModel, root: Path) -> tuple[Sequence[OtherFile], Sequence[str]]:
    """Files of the same shape and another quantization, beside the model or among the artifacts that come from the same
    weights; and why others are not.
    """
    found: dict[str, OtherFile] = {}
    problems = []
    for path in _candidates(model, root):
        try:
            header = gguf_file.check(path)
        except ApplianceError as error:
            problems.append(f"{path} is not measured: {error}")
            continue
        if header.quantization not in (model.header.quantization, *found) and shape(header) == shape(model.header):
            is_foreign = not (path.parent / artifacts.MANIFEST).is_file()
            found[header.quantization] = OtherFile(
                quantization=header.quantization,
                path=path,
                size_bytes=header.size_bytes,
                remark=path.name,
                is_foreign=is_foreign,
            )
    return list(found.values()), problems


def shape(header: GgufHeader) -> object:
    """What two files of one model have in common: names and shapes of their tensors."""
    return header.architecture, sorted((tensor.name, tensor.shape) for tensor in header.tensors)


def compare(
    files: Sequence[OtherFile],
    settings: EngineSettings,
    tasks: tuple[Task, Task],
    measure: Measure,
    on_progress: Progress,
) -> Sequence[FileSpeed]:
    """All files in turn, with the same settings: `tasks` are a prompt to read and an answer to write."""
    rates: Mapping[Path, tuple[list[float], list[float]]] = {file.path: ([], []) for file in files}
    for number in range(ROUNDS):
        for place, file in enumerate(files):
            on_progress((number + place / len(files)) / ROUNDS, file.quantization)
            this = msgspec.structs.replace(settings, model_path=str(file.path), sha256="")
            for task, values in zip(tasks, rates[file.path], strict=True):
                values.append(tokens_of(task) / measure(this, task))
    return [
        FileSpeed(file=file, reading=Rate(values=tuple(reading)), writing=Rate(values=tuple(writing)))
        for file, (reading, writing) in ((file, rates[file.path]) for file in files)
    ]


def _candidates(model: ServedModel, root: Path) -> Sequence[Path]:
    beside = [path for path in sorted(model.path.parent.glob(f"*{SUFFIX}")) if path.name != model.path.name]
    own = model.path.parent / artifacts.MANIFEST
    if not own.is_file():
        return beside
    mine = artifacts.load(own.parent)
    family = {mine.id, *mine.manifest["parents"]}
    related = []
    for manifest in sorted((root / "gguf").glob(f"*/{artifacts.MANIFEST}")):
        other = artifacts.load(manifest.parent)
        if other.id != mine.id and family & {other.id, *other.manifest["parents"]}:
            related += [other.path / name for name in other.manifest["files"] if name.endswith(SUFFIX)]
    return [*beside, *related]
