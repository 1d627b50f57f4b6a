"""`make onnx-env`: the environment that exports encoders to ONNX, pinned, in the cache. `python -m appliance.onnx_setup`.

Built as `make setup` builds `.venv`, with the same steps; one that is there is left alone, an interrupted one continues. It
is always for the CPU: an export computes one small batch. What runs in it is `convert/onnx_export.py`.
"""

import dataclasses
import re
import sys

from appliance import setup
from appliance.config import cache_root
from convert import llama_cpp_source, onnx_environment

REQUIREMENTS = ("optimum-onnx", "transformers", "onnx", "onnxruntime", "safetensors")
NEEDED_BYTES = 3 * setup.GIB  # 1.3 GiB measured, and room for pip's temporary files
PROOF = "import onnxruntime.quantization, optimum.exporters.onnx"


def main() -> int:
    return setup.reporting(lambda: set_up(make_plan(setup.make_plan(setup.ROOT, llama_cpp_source.pip_environment()))))


def make_plan(main_plan: setup.Plan) -> setup.Plan:
    """The plan of `.venv`, made one for this environment; an index that is for cards is not taken."""
    pins = onnx_environment.CONSTRAINTS.read_text()
    return dataclasses.replace(
        main_plan,
        backend="cpu",
        torch_index=main_plan.torch_index if main_plan.backend == "cpu" else setup.CPU_INDEX,
        torch_pin=re.findall(r"^torch==\S+", pins, re.MULTILINE)[0],
        requirements=REQUIREMENTS,
        digest=onnx_environment.digest(),
        venv=onnx_environment.folder(),
        constraints=onnx_environment.CONSTRAINTS,
    )


def set_up(plan: setup.Plan) -> None:
    """Builds the environment; returns at once when it is there already."""
    if onnx_environment.mark().exists():
        return
    with llama_cpp_source.locked(cache_root()):
        if onnx_environment.mark().exists():
            return
        setup.refuse([*setup.missing_python_parts(needs_headers=False), *setup.missing_space([(plan.venv, NEEDED_BYTES)])])
        setup.make_environment(plan)
        setup.install_torch(plan)
        setup.say("installing what exporting to ONNX needs")
        setup.pip_install(plan, *plan.requirements)
        setup.run([plan.python, "-I", "-c", PROOF], "The environment was made, but Optimum's exporter does not load in it.")
        onnx_environment.mark().touch()
        setup.say(f"ready: {plan.venv}")


if __name__ == "__main__":
    sys.exit(main())
