"""Measures which tensors lose most by being quantized: `python -m convert.sensitivity`, `appliance convert sensitivity`.

A model is quantized as a whole; then again for each role that tensors have (the token embedding, all `ffn_down`), with these
in a better type. What that takes off the divergence from 16 bits, and adds to the file, is written down. With it
`appliance convert quantize --sensitivity REPORT --spend 40MiB` spends bytes where they count.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from appliance import artifacts, config
from appliance.artifacts import Plan
from appliance.console import Command, Progress, emit, human_bytes, json_option, note
from appliance.errors import DataError, ModelFileError
from convert import conversations, divergence, fitting, gguf_source, llama_cpp_source, pre_tokenizer
from convert import imatrix as matrices
from convert.divergence import Answer
from convert.gguf_model import GgufModel
from convert.gguf_source import Source
from convert.quantizer import TENSOR_TYPES, TYPES, Settings, quantize_file, tensor_types

REVISION = 1  # raised when the same inputs would give other figures
FILE = "sensitivity.json"
TOKENS = 2048
UNREAD = re.compile(r"^blk\.\d+\.|\.weight$")  # of a tensor's name, what is not its role


@dataclasses.dataclass(frozen=True, slots=True)
class Role:
    """Tensors of one role in a better type: bytes more, and the KL divergence that is left (nats, mean of the languages).

    `tensor` is the name of one of them.
    """

    role: str
    tensor: str
    extra_bytes: int
    kl: float
    languages: Mapping[str, float]


@dataclasses.dataclass(frozen=True, slots=True)
class Sensitivity:
    """Of a model quantized to `type`, with each role in turn in `better`; `kl` is of the file in which none is."""

    model: str
    type: str
    better: str
    kl: float
    languages: Mapping[str, float]
    roles: Sequence[Role]

    def saved_ratio(self, role: Role) -> float:
        """The part of the divergence that goes; below 0 where it grew."""
        return 1 - role.kl / self.kl if self.kl else 0.0


@click.command(cls=Command)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--merged", type=click.Path(path_type=Path), required=True, help="The folder that the file was made from.")
@click.option("--conversations", "rows", type=click.Path(path_type=Path), required=True, help="JSON lines with messages.")
@click.option("--type", "kind", type=click.Choice(list(TYPES)), default="Q4_K_M", show_default=True)
@click.option("--better", type=click.Choice(list(TENSOR_TYPES)), default="Q8_0", show_default=True, help="For one role.")
@click.option("--imatrix", type=click.Path(path_type=Path), help="An importance matrix (a file, or its artifact folder).")
@click.option("--language", "codes", multiple=True, default=("en",), show_default=True, help="ISO 639-1; repeat for more.")
@click.option("--tokens", type=click.IntRange(min=64), default=TOKENS, show_default=True, help="Of answers, about.")
@click.option("--name", help="Name of the result; default: the model's.")
@click.option("--dry-run", is_flag=True, help="Say what would be made, and make nothing.")
@json_option
def sensitivity(
    model: Path,
    merged: Path,
    rows: Path,
    kind: str,
    better: str,
    imatrix: Path | None,
    codes: tuple[str, ...],
    tokens: int,
    name: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Measure which tensors of MODEL, a 16-bit GGUF file or its artifact folder, lose most when it is quantized."""
    root = config.artifacts_root()
    importance = None if imatrix is None else matrices.file_of(imatrix)
    source = gguf_source.find(model)
    parents = [source.origin, merged, *([] if importance is None else [artifacts.origin(importance)])]
    plan = Plan(
        kind="report",
        name=f"{name or source.stem}-sensitivity",
        inputs={
            **{"revision": REVISION, "what": "sensitivity", "llama_cpp_python": llama_cpp_source.VERSION},
            "conversations": f"{artifacts.identity(rows.parent)}/{rows.name}",
        },
        parents=[artifacts.identity(each) for each in parents],
        config={"type": kind, "better": better, "languages": list(codes), "tokens": tokens},
    )
    state = "unchanged" if plan.existing(root) else "to make" if dry_run else "made"
    if state == "made":
        gguf_source.require(source)
        for given in (source.file, merged, rows, *([] if importance is None else [importance])):
            artifacts.check_input(given)
        artifacts.require_space(root, source.file.stat().st_size, "Quantizing the model")
        config.apply_quiet_environment()
        groups = pick_answers(merged, conversations.by_language(conversations.read(rows), codes), tokens, source.file)
        with artifacts.create(plan, root) as draft:
            settings = Settings(type=kind, imatrix={} if importance is None else matrices.read(importance))
            found = measure(source, settings, better, groups, draft.path / "quantized.gguf")
            (draft.path / FILE).write_text(json.dumps(dataclasses.asdict(found), indent=2) + "\n", encoding="utf-8")
            draft.results.update(dataclasses.asdict(found))
        for line in table(found):
            note(f"sensitivity: {line}")
    file = plan.location(root) / FILE
    emit({"artifact": plan.location(root), "file": file, "state": state}, as_json, f"{file} ({state})")


def measure(
    source: Source, settings: Settings, better: str, groups: Mapping[str, Sequence[Answer]], scratch: Path
) -> Sensitivity:
    """Quantizes to `scratch` once for each role and once more, which is gone afterwards."""
    extra = extra_bytes(source.file, settings, better)
    limit = max(len(answer.tokens) for group in groups.values() for answer in group)
    progress = Progress("sensitivity", len(extra) + 1)

    with GgufModel(source.file, limit) as full:

        def lost(overrides: Sequence[tuple[str, str]], number: int) -> dict[str, float]:
            try:
                quantize_file(source.file, scratch, dataclasses.replace(settings, overrides=overrides))
                with GgufModel(scratch, limit) as quantized:
                    languages = divergence.measure(full, quantized, groups).languages
            finally:
                scratch.unlink(missing_ok=True)
            progress.update(number)
            return {code: each["kl_mean"] for code, each in languages.items()}

        base = lost([], 1)
        roles = []
        for number, (tensor, size_bytes) in enumerate(extra.items(), 2):
            role = role_of(tensor)
            languages = lost([(pattern_of(role), better)], number)
            roles.append(Role(role, tensor, size_bytes, _mean(languages), languages))
    return Sensitivity(
        model=artifacts.identity(source.origin),
        type=settings.type,
        better=better,
        kl=_mean(base),
        languages=base,
        roles=sorted(roles, key=lambda role: role.kl),
    )


def extra_bytes(source: Path, settings: Settings, better: str) -> dict[str, int]:
    """What the file grows by for each role that gets the better type, by the name of its first tensor.

    Roles with a tensor that would shrink are left out. Raises `ModelFileError` where no role would grow.
    """
    header = fitting.read(source)
    types = tensor_types(source, settings)
    usual = {each.name: each.size_bytes for each in fitting.with_types(header, types).tensors}
    found = {}
    # A tensor that stays as it is in the source (a norm) is not quantized in any type.
    quantized = [each.name for each in header.tensors if types.get(each.name, each.type) != each.type]
    for tensor in {role_of(name): name for name in reversed(quantized)}.values():
        overrides = [(pattern_of(role_of(tensor)), better)]
        changed = tensor_types(source, dataclasses.replace(settings, overrides=overrides))
        grown = [each.size_bytes - usual[each.name] for each in fitting.with_types(header, changed).tensors]
        if min(grown) >= 0 and sum(grown) > 0:
            found[tensor] = sum(grown)
    if not found:
        raise ModelFileError(
            f"No tensor of {source} is better off in {better} than {settings.type} leaves it; name another."
        )
    return found


def role_of(name: str) -> str:
    """`blk.7.ffn_down.weight` is one of many `ffn_down`."""
    return UNREAD.sub("", name)


def pattern_of(role: str) -> str:
    """Names of its tensors, as a regular expression of ECMAScript and of Python."""
    return rf"^(blk\.[0-9]+\.)?{re.escape(role)}\.weight$"


def file_of(given: Path | None) -> Path | None:
    """The report's file, given that or the folder of its artifact."""
    return given if given is None or given.suffix == ".json" else given / FILE


def read(file: Path) -> Sensitivity:
    """A report; raises `ModelFileError`."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        return Sensitivity(**{**table, "roles": [Role(**role) for role in table["roles"]]})
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{file} is no report of `appliance convert sensitivity` ({type(error).__name__}: {error})."
        raise ModelFileError(message) from error


def choose(roles: Sequence[Role], kl: float, spend_bytes: int) -> list[Role]:
    """Those that save most of `kl` for a byte first, as long as they fit. May be empty."""
    chosen = []
    for role in sorted(roles, key=lambda role: (role.kl - kl) / role.extra_bytes):
        if role.kl < kl and role.extra_bytes <= spend_bytes:
            chosen.append(role)
            spend_bytes -= role.extra_bytes
    return chosen


def table(found: Sensitivity) -> list[str]:
    """A line for each role, the most worth first."""
    lines = [f"{found.type}: KL {found.kl:.4f}; with {found.better} for"]
    return lines + [f"  {each.role:<12} {told(found, each)}" for each in found.roles]


def told(found: Sensitivity, role: Role) -> str:
    saved = found.saved_ratio(role)
    what = f"{saved:.0%} of the loss less" if saved > 0 else f"{-saved:.0%} more, so nothing to gain"
    return f"{human_bytes(role.extra_bytes):>10} more, KL {role.kl:.4f}: {what}"


def pick_answers(
    merged: Path, groups: Mapping[str, Sequence[conversations.Messages]], tokens: int, model: Path
) -> dict[str, list[Answer]]:
    """Answers to measure on, evenly from all over each language's rows, with an equal share of `tokens`."""
    tokenizer = pre_tokenizer.load(merged)
    limit = fitting.read(model).context_length or tokens
    found: dict[str, list[Answer]] = {}
    for code, rows in groups.items():
        every = divergence.answers(tokenizer, rows, limit)
        sizes = sum(len(answer.tokens) - answer.start for answer in every)
        step = max(1, -(-sizes * len(groups) // tokens))
        if picked := every[::step]:
            found[code] = picked
    if not found:
        raise DataError("The conversations hold no answer that fits the model's context, so no loss can be measured.")
    return found


def _mean(languages: Mapping[str, Any]) -> float:
    return float(sum(languages.values()) / len(languages))


if __name__ == "__main__":
    sensitivity()
