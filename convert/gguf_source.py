"""A 16-bit GGUF file as a person names it, itself or the folder of its artifact: what is quantized and measured."""

from dataclasses import dataclass
from pathlib import Path

from appliance import artifacts
from appliance.errors import ModelFileError

KEY_LENGTH = 13  # of an artifact's folder, behind its name: a hyphen and twelve digits
NUMBER_TYPES = ("-F16", "-BF16", "-F32")


@dataclass(frozen=True, slots=True)
class Source:
    """The file; what a manifest names as its origin; and the model's name, without a number type."""

    file: Path
    origin: Path
    stem: str


def find(given: Path) -> Source:
    """Whether the file exists is not asked: a dry run names what is not made yet."""
    is_file = given.suffix == ".gguf"
    file = given if is_file else given / f"{given.name[:-KEY_LENGTH]}.gguf"
    stem = file.stem.removesuffix(next((end for end in NUMBER_TYPES if file.stem.endswith(end)), ""))
    return Source(file, artifacts.origin(file) if is_file else given, stem)


def require(source: Source) -> None:
    """Raises `ModelFileError`."""
    if not source.file.is_file():
        raise ModelFileError(f"{source.file} does not exist; name a GGUF file or the folder of one.")
