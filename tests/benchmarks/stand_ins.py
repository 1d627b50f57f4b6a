"""Stand-in servers and what a benchmark starts them with."""

import sys
from pathlib import Path

from benchmarks.prompts import Prompts
from benchmarks.servers import Launch, Server
from benchmarks.workloads import Trial

SCRIPT = Path(__file__).parent / "stand_in_server.py"
PROMPTS = Prompts(words=(" een", " twee", " drie"), end_tokens=(2, 3))


def stand_in(manner: str = "good", name: str = "") -> Server:
    return Server(
        name=name or manner,
        command=lambda _, port: [sys.executable, str(SCRIPT), str(port), manner],
        fields=lambda launch: {"logit_bias": {str(token): -100 for token in launch.end_tokens}},
        ready_path="/health",
    )


def launch(folder: Path) -> Launch:
    model = folder / "model.gguf"
    model.write_bytes(b"GGUF" * 4096)
    return Launch(model=model, folder=folder, threads=1, slots=2, context_tokens=64, end_tokens=PROMPTS.end_tokens)


def trial(folder: Path, manner: str = "good", name: str = "") -> Trial:
    return Trial(server=stand_in(manner, name), launch=launch(folder), prompts=PROMPTS, round=1, is_quick=True)
