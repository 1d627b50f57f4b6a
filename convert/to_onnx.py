"""Exports an encoder to ONNX, in fp32 and int8, and proves it: `python -m convert.to_onnx`, `appliance convert onnx`.

Optimum exports in an environment of its own (`onnx_environment.py`); this one computes the same texts with PyTorch and with
the file, at shapes that were not traced, and keeps the file only if they agree. int8 is measured the same way, not judged.
`appliance/encoders.py` runs what comes out; it needs no torch.
"""

import shutil
from pathlib import Path
from typing import Any, get_args

import click

from appliance import artifacts, config
from appliance.artifacts import NAME_WITH_DIGEST, Plan
from appliance.console import Command, emit, human_bytes, json_option, note
from appliance.encoders import MODELS, TOKENIZER, Encoder, EncoderSettings, Kind, Pooling, Precision, write_settings
from appliance.errors import RecipeError
from convert import onnx_environment
from convert.encoder_folder import Wishes, describe

REVISION = 1  # raised when the same inputs would give other files
SPARE_BYTES = 100_000_000
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")  # the one that is judged first


@click.command(cls=Command)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--kind", type=click.Choice(get_args(Kind)), help="Instead of what the model's files say.")
@click.option("--pooling", type=click.Choice(get_args(Pooling)), help="For an embedding model whose files do not say.")
@click.option("--labels", metavar="A,B,…", help="Names of a classifier's outputs, in their order.")
@click.option(
    "--max-tokens", type=click.IntRange(min=4), help="The longest input; default: what the model was trained with."
)
@click.option("--query-prefix", help="Put before what is searched for, for example 'query: '; default: the model's own.")
@click.option("--passage-prefix", help="Put before what is found.")
@click.option("--name", help="Name of the result; default: the model folder's.")
@click.option("--dry-run", is_flag=True, help="Say what would be made, and make nothing.")
@json_option
def onnx(model: Path, labels: str | None, name: str | None, dry_run: bool, as_json: bool, **wishes: Any) -> None:
    """Export MODEL (a folder), an embedding model, reranker or classifier, to ONNX; exit 4 when it differs from PyTorch."""
    root = config.artifacts_root()
    named = tuple(label.strip() for label in labels.split(",")) if labels else ()
    if labels is not None and not all(named):
        raise RecipeError(f"--labels {labels!r}: a label is empty.")
    settings = describe(model, Wishes(labels=named, **wishes))
    plan = Plan(
        kind="encoder",
        name=name or (model.name[:-13] if NAME_WITH_DIGEST.fullmatch(model.name) else model.absolute().name),
        inputs={"revision": REVISION, "environment": onnx_environment.digest()},
        parents=[artifacts.identity(model)],
        config=config.plain(settings),
    )
    existing = plan.existing(root)
    state = "unchanged" if existing else "to make" if dry_run else "made"
    if state == "made":
        _make(plan, model, settings, root)
        existing = artifacts.load(plan.location(root))
    results = dict(existing.results) if existing else {}
    location = plan.location(root)
    emit({"artifact": location, "kind": settings.kind, "state": state, "results": results}, as_json, f"{location} ({state})")


def _make(plan: Plan, model: Path, settings: EncoderSettings, root: Path) -> None:
    from convert import encoder_check

    onnx_environment.python()  # before minutes are spent on what needs it
    artifacts.check_input(model)
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    artifacts.require_space(root, 4 * weights + SPARE_BYTES, "The export")  # fp16 becomes fp32, and int8 beside it
    config.apply_quiet_environment()
    expected = encoder_check.reference(model, settings)
    task = "feature-extraction" if settings.kind == "embedding" else "text-classification"
    with artifacts.create(plan, root) as draft:
        versions = onnx_environment.export(model, draft.path, task)
        shutil.copyfile(model / TOKENIZER, draft.path / TOKENIZER)
        write_settings(draft.path, settings)
        for precision in PRECISIONS:
            measured = encoder_check.compare(expected, Encoder.load(draft.path, precision))
            if precision == "fp32":
                encoder_check.require_equal(measured, expected, model, versions)
            size = sum(file.stat().st_size for file in draft.path.glob(f"{MODELS[precision]}*"))
            draft.results[precision] = {**measured, "size_bytes": size}
            figures = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in measured.items())
            note(f"onnx: {precision}, {human_bytes(size)}: {figures}")
        draft.results.update(texts=len(expected.texts), longest_tokens=expected.longest_tokens, exported_by=versions)


if __name__ == "__main__":
    onnx()
