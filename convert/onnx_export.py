"""Exports an encoder to ONNX, with Optimum, and quantizes it: what runs in the export environment, and nowhere else.

Usage: python -I onnx_export.py MODEL_FOLDER TARGET_FOLDER feature-extraction|text-classification. Writes model.onnx and
model-int8.onnx, and prints the versions of what made them as JSON. Started by `convert.onnx_environment`; imports nothing
of this project, because the environment does not have it. Whether the files are right is judged elsewhere.
"""

import errno
import importlib.metadata
import json
import sys
from pathlib import Path

NO_SPACE = 28  # exit code: the disk is full
PACKAGES = ("transformers", "optimum", "optimum-onnx", "onnx", "onnxruntime", "torch")


def main() -> None:
    folder, target, task = sys.argv[1:]
    sys.addaudithook(refuse_network)
    try:
        export(Path(folder), Path(target), task)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.exit(NO_SPACE)
    print(json.dumps({package: importlib.metadata.version(package) for package in PACKAGES}))


def refuse_network(event: str, arguments: tuple[object, ...]) -> None:
    """Whatever the libraries try: an export needs files only."""
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        raise PermissionError(f"the export wanted the network: {event} {arguments[1:]}")


def export(folder: Path, target: Path, task: str) -> None:
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from optimum.exporters.onnx import export as export_model
    from optimum.exporters.tasks import TasksManager
    from transformers import AutoModel, AutoModelForSequenceClassification

    loader = AutoModel if task == "feature-extraction" else AutoModelForSequenceClassification
    model = loader.from_pretrained(folder, dtype=torch.float32, local_files_only=True, use_safetensors=True).eval()
    settings = TasksManager.get_exporter_config_constructor("onnx", model, task=task, library_name="transformers")
    export_model(model, settings(model.config), target / "model.onnx")
    # One scale for each output channel: with one for a whole matrix MiniLM's worst cosine was 0.95 instead of 0.99. And 7
    # bits of weights: products of 8 overflow the 16-bit sums of CPUs without VNNI, where the same file gave 0.956 for 0.988.
    options = {"per_channel": True, "reduce_range": True, "weight_type": QuantType.QInt8}
    quantize_dynamic(target / "model.onnx", target / "model-int8.onnx", **options)


if __name__ == "__main__":
    main()
