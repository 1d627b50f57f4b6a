"""Computes an importance matrix: `python -m convert.imatrix`, `appliance convert imatrix`.

For each matrix of the layers, the mean square of every input column over calibration text (llama.cpp, tools/imatrix): how
much an error in that column of the weights matters. The text is the assistant's own: conversations of its data set,
rendered with all special tokens, equally many tokens of each language. Computed by PyTorch in float32 on the merged model,
which stays on disk. Written in llama.cpp's own format, so that its tools read it too.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from appliance import artifacts, config
from appliance.artifacts import Plan
from appliance.console import Command, Progress, emit, json_option, note
from appliance.errors import DataError, ModelFileError
from appliance.recipe import Quantize
from convert import conversations, gguf_names, pre_tokenizer
from convert.mapped_model import MappedModel

REVISION = 1  # raised when the same inputs would give another matrix
FILE = "imatrix.gguf"
BATCH_TOKENS = 2048  # whose activations are in memory together: 80 MB where a matrix has 9,728 columns
SUMS, COUNTS = ".in_sum2", ".counts"  # names of llama.cpp's format


@dataclass(frozen=True, slots=True)
class Sums:
    """Of one matrix: the sum of squares of each input column, and over how many tokens."""

    squares: Any
    tokens: int

    @property
    def means(self) -> Any:
        return self.squares / self.tokens


@click.command(cls=Command)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--conversations", "rows", type=click.Path(path_type=Path), required=True, help="JSON lines with messages.")
@click.option("--language", "codes", multiple=True, default=("en",), show_default=True, help="ISO 639-1; repeat for more.")
@click.option(
    "--tokens", type=click.IntRange(min=256), default=Quantize().imatrix_tokens, show_default=True, help="To read, at most."
)
@click.option("--name", help="Name of the result; default: the model's.")
@click.option("--dry-run", is_flag=True, help="Say what would be made, and make nothing.")
@json_option
def imatrix(
    model: Path, rows: Path, codes: tuple[str, ...], tokens: int, name: str | None, dry_run: bool, as_json: bool
) -> None:
    """Compute the importance matrix of MODEL (a merged folder) over the conversations that it was trained on."""
    root = config.artifacts_root()
    data = f"{artifacts.identity(rows.parent)}/{rows.name}"
    plan = Plan(
        kind="report",
        name=f"{name or model.name}-imatrix",
        inputs={"revision": REVISION, "what": "imatrix", "conversations": data},
        parents=[artifacts.identity(model)],
        config={"tokens": tokens, "languages": list(codes)},
    )
    state = "unchanged" if plan.existing(root) else "to make" if dry_run else "made"
    if state == "made":
        _make(plan, model, rows, codes, tokens, root)
    file = plan.location(root) / FILE
    emit({"artifact": plan.location(root), "file": file, "state": state}, as_json, f"{file} ({state})")


def _make(plan: Plan, model: Path, rows: Path, codes: Sequence[str], tokens: int, root: Path) -> None:
    artifacts.check_input(model)
    artifacts.check_input(rows)
    config.apply_quiet_environment()
    mapped = MappedModel(model)
    chosen = calibration_text(model, conversations.by_language(conversations.read(rows), codes), tokens)
    texts = [ids for group in chosen.values() for ids in group]
    sums = collect(mapped, texts)
    with artifacts.create(plan, root) as draft:
        write(draft.path / FILE, sums, datasets=[plan.inputs["conversations"]], chunk_tokens=max(map(len, texts)))
        counts = {code: sum(map(len, group)) for code, group in chosen.items()}
        draft.results.update(matrices=len(sums), tokens=counts)
        note(f"imatrix: {len(sums)} matrices, tokens read: {', '.join(f'{code} {n:,}' for code, n in counts.items())}")


def calibration_text(
    folder: Path, groups: Mapping[str, Sequence[conversations.Messages]], tokens: int
) -> dict[str, list[list[int]]]:
    """Token ids of whole conversations, rendered as they were trained on; each language has an equal share of `tokens`.

    Rows are taken evenly over a language's rows. Raises `DataError` when there is nothing to read, or when the chat template
    refuses a conversation; `ModelFileError` when there is no template.
    """
    tokenizer = pre_tokenizer.load(folder)
    chosen: dict[str, list[list[int]]] = {}
    for code, rows in groups.items():
        share = tokens // len(groups)
        rendered = [
            conversations.token_ids(tokenizer, row, f"conversation {number} of those in {code}")
            for number, row in enumerate(rows, 1)
        ]
        mean = sum(map(len, rendered)) / len(rendered)
        step = max(1.0, len(rendered) * mean / share)
        picked = [rendered[int(place * step)] for place in range(int((len(rendered) - 1) // step) + 1)]
        chosen[code] = _first(picked, share)
    if not any(chosen.values()):
        raise DataError("The conversations hold no text, so no importance can be measured.")
    return chosen


def _first(rows: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """Rows as long as they fit into `tokens`; at least one, cut if need be."""
    kept: list[list[int]] = []
    left = tokens
    for ids in rows:
        if kept and len(ids) > left:
            continue
        kept.append(ids[: max(left, 1)])
        left -= len(kept[-1])
    return kept


def collect(model: MappedModel, texts: Sequence[Sequence[int]]) -> dict[str, Sums]:
    """Runs the texts through the model; sums by the names that the matrices have in a GGUF file.

    As llama.cpp's own tool does, only matrices of the layers count, not the head. Raises `ModelFileError` for values that
    are no numbers.
    """
    import torch

    name_of = gguf_names.tensor_names(model.checkpoint.settings)
    squares: dict[str, Any] = {}
    is_text = torch.empty(0)

    def watch(name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        def before(_module: Any, arguments: tuple[Any, ...]) -> None:
            columns = arguments[0].reshape(-1, arguments[0].shape[-1])[is_text]
            found = columns.square().sum(dim=0, dtype=torch.float64)
            squares[name] = squares[name] + found if name in squares else found

        return before

    handles = [
        module.register_forward_pre_hook(watch(name))
        for path, module in model.matrices.items()
        if (name := name_of(f"{path}.weight")) is not None and name.startswith("blk.")
    ]
    head = model.module.get_output_embeddings()
    layers = [path for path, module in model.matrices.items() if module is not head]
    if unnamed := [path for path in layers if name_of(f"{path}.weight") is None]:
        note(f"imatrix: no importance for {unnamed[0]} ({len(unnamed)} such), which a GGUF file has under other names")
    batches = list(_batches(texts))
    progress = Progress("imatrix", len(batches))
    try:
        for number, batch in enumerate(batches, 1):
            longest = max(map(len, batch))
            # What follows a text in its row changes nothing of it, since a token sees only those before it.
            ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in batch])
            is_text = torch.cat([torch.arange(longest) < len(text) for text in batch])
            model.run(ids)
            progress.update(number)
    finally:
        for handle in handles:
            handle.remove()
    for name, found in squares.items():
        if not torch.isfinite(found).all():
            raise ModelFileError(f"{name} is given values that are no numbers (NaN): the model's training diverged.")
    tokens = sum(map(len, texts))
    return {name: Sums(found.numpy().astype("float32"), tokens) for name, found in sorted(squares.items())}


def _batches(texts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Texts of much the same length together: weights are read from disk and widened once for each batch."""
    batch: list[Sequence[int]] = []
    for text in sorted(texts, key=len, reverse=True):
        if batch and (len(batch) + 1) * len(batch[0]) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(text)
    yield batch


def write(path: Path, sums: Mapping[str, Sums], *, datasets: Sequence[str], chunk_tokens: int) -> None:
    """A GGUF file as llama.cpp's tools write it (tools/imatrix/imatrix.cpp, `save_imatrix`)."""
    import numpy

    gguf = gguf_names.gguf_package()
    writer = gguf.GGUFWriter(path, arch="")
    writer.add_type("imatrix")
    writer.add_array(gguf.Keys.IMatrix.DATASETS, list(datasets))
    total = next(iter(sums.values())).tokens
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, max(1, total // chunk_tokens))
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, chunk_tokens)
    for name, each in sums.items():
        writer.add_tensor(name + SUMS, each.squares[None, :])
        writer.add_tensor(name + COUNTS, numpy.array([[each.tokens]], dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def file_of(given: Path) -> Path:
    """The matrix's file, given that or the folder of its artifact."""
    return given if given.suffix == ".gguf" else given / FILE


def read(path: Path) -> dict[str, Any]:
    """The mean square of each input column, float32, by tensor; of a file of ours or of llama.cpp's `llama-imatrix`."""
    gguf = gguf_names.gguf_package()
    try:
        tensors = {each.name: each.data.reshape(-1) for each in gguf.GGUFReader(path).tensors}
        names = [name.removesuffix(SUMS) for name in tensors if name.endswith(SUMS)]
        means = {name: (tensors[name + SUMS] / tensors[name + COUNTS][0]).astype("float32") for name in names}
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ModelFileError(f"{path} is no importance matrix in the GGUF format ({error}).") from error
    if not means:
        raise ModelFileError(f"{path} holds no importance matrix; `appliance convert imatrix` makes one.")
    return means


if __name__ == "__main__":
    imatrix()
