"""What `make image-test` prints at its end."""

import dataclasses
from pathlib import Path

from tests.images.image_engine import Layer

NOT_PROVEN = {
    "cpu": "arm64 (`make image-test-arm64`)",
    "cpu-train": "a card; a model of real size",
    "cuda": "nvidia/cuda as a base, compiling for CUDA, a card",
    "rocm": "rocm/dev-ubuntu as a base, compiling for HIP, a card",
}


@dataclasses.dataclass(slots=True)
class Row:
    """One image in the table; times are seconds."""

    image: str
    archive: Path
    built_in: float
    size_bytes: int
    layers: list[Layer]
    started_in: float | None = None
    answered: str = "–"
    stopped_in: float | None = None


def table(rows: dict[str, Row]) -> str:
    """Markdown."""
    titles = ["image", "built in", "compressed", "started in", "answered", "stopped in", "not proven here"]
    lines = [titles, ["---"] * len(titles)]
    for backend, row in rows.items():
        times = ["–" if each is None else f"{each:.1f} s" for each in (row.started_in, row.stopped_in)]
        size = f"{row.size_bytes / 1e6:.0f} MB"
        lines.append([row.image, f"{row.built_in:.0f} s", size, times[0], row.answered, times[1], NOT_PROVEN[backend]])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    for row in rows.values():
        largest = sorted(row.layers, key=lambda layer: -layer.size_bytes)[:3]
        said = (f"{layer.size_bytes / 1e6:.0f} MB {_step(layer)!r}" for layer in largest)
        text += f"\nlargest layers of {row.image}: {'; '.join(said)}"
    return text


def _step(layer: Layer) -> str:
    """As the Dockerfile has it, without what buildah puts around it."""
    return layer.made_by.removeprefix("/bin/sh -c ").removeprefix("#(nop) ").split("#")[0].strip()[:70]
