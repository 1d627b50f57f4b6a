"""A LoRA adapter as PEFT writes it: which weights of the base it changes, and how. Read by `merge` and `adapter`.

W' = W + s * B @ A with s = alpha / r, or alpha / sqrt(r) for rsLoRA (Hu et al. 2021; Kalajdzievski 2023). DoRA (Liu et
al. 2024) then scales each row of W' to a learned length. Names of tensors and settings are those of PEFT
(tuners/lora/config.py).
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.errors import ModelFileError

PREFIX = "base_model.model."
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FACTOR_A, FACTOR_B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
EMBEDDING_A, EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
PARTNERS = {FACTOR_A: FACTOR_B, FACTOR_B: FACTOR_A, EMBEDDING_A: EMBEDDING_B, EMBEDDING_B: EMBEDDING_A}
INSTEAD = "merge it with PEFT (merge_and_unload) and convert what that saves"

# PiSSA and its like move a part of the base into the adapter, so that it belongs to a base that nobody has.
CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
ROWS_BYTES = 1 << 26  # of float32 rows that are changed at a time
UNUSABLE = {
    "alora_invocation_tokens": "it is active in part of a text only",
    "arrow_config": "it routes each token between several adapters",
    "kasa_config": "it belongs to a changed base",
    "layer_replication": "it belongs to a model whose layers are repeated",
    "lora_bias": "its second factor has a bias",
    "target_parameters": "it changes parameters that are no layer's weight",
    "trainable_token_indices": f"it trains the embeddings of single tokens; {INSTEAD}, or train whole embeddings"
    " (modules_to_save)",
    "use_bdlora": "its factors are made of blocks (BD-LoRA)",
    "use_qalora": "it pools its input (QALoRA)",
}


@dataclass(frozen=True, slots=True)
class Change:
    """What an adapter adds to one weight: `scale * b @ a`, of shapes `(out, rank)` and `(rank, in)`.

    With a `magnitude` (DoRA) the rows of the sum get these lengths. A transposed weight is stored `(in, out)`, as in GPT-2.
    `is_embedding` is known by the factors, whatever the module is called.
    """

    a: Any
    b: Any
    scale: float
    magnitude: Any | None = None
    is_transposed: bool = False
    is_embedding: bool = False

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """The shape that the weight must have in the base's file."""
        out, into = int(self.b.shape[0]), int(self.a.shape[1])
        return (into, out) if self.is_transposed else (out, into)


@dataclass(frozen=True, slots=True)
class Adapter:
    """By the names of weights in the base: what is added to some, and what replaces others (trained embeddings, biases).

    Where a weight is in both, what is added is added to what replaces it: PEFT saves embeddings and heads beside their LoRA.
    `is_tied`: the embeddings that replace the base's are those of the head, too.
    """

    changes: Mapping[str, Change]
    replaced: Mapping[str, Any]
    is_tied: bool = False


def read_adapter(folder: Path) -> Adapter:
    """Raises `ModelFileError` for what is damaged, and for what cannot be applied exactly, with the reason."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"{CONFIG} holds {settings!r}")
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise ModelFileError(f"{folder} is no adapter: {error.filename} is missing.") from error
    except (ValueError, SafetensorError) as error:
        raise ModelFileError(f"The adapter in {folder} is damaged ({error}); train it again.") from error
    if reason := _unusable(settings):
        raise ModelFileError(f"{folder} cannot be used exactly: {reason}.")
    return _sorted_out(tensors, settings, folder)


def merged_rows(weight: Any, change: Change, dtype: Any = None) -> Iterator[Any]:
    """The changed weight in its own type, or another, some rows at a time.

    `weight` is a slice of a safetensors file, or a tensor.
    """
    import torch

    dtype = dtype or weight[:1].dtype
    a, b = change.a.to(torch.float32), change.b.to(torch.float32) * change.scale
    if change.is_transposed:
        whole = weight[:, :].to(torch.float32).T + b @ a
        yield _with_length(whole, change.magnitude).T.to(dtype).contiguous()
        return
    step = max(1, ROWS_BYTES // (4 * a.shape[1]))
    for start in range(0, b.shape[0], step):
        rows = weight[start : start + step]
        magnitude = None if change.magnitude is None else change.magnitude[start : start + step]
        yield _with_length(rows.to(torch.float32) + b[start : start + step] @ a, magnitude).to(dtype)


def rows_as(tensor: Any, dtype: Any) -> Iterator[Any]:
    """A tensor in another type, some rows at a time."""
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim else tensor.reshape(1, 1)
    step = max(1, ROWS_BYTES // (4 * rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        yield rows[start : start + step].to(dtype)


def _with_length(rows: Any, magnitude: Any | None) -> Any:
    """Rows scaled to the lengths that DoRA learned."""
    import torch

    if magnitude is None:
        return rows
    return rows * (magnitude.to(torch.float32) / torch.linalg.norm(rows, dim=1))[:, None]


def _sorted_out(tensors: Mapping[str, Any], settings: Mapping[str, Any], folder: Path) -> Adapter:
    changes: dict[str, Change] = {}
    replaced: dict[str, Any] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if (ending := next((each for each in PARTNERS if name.endswith(each)), None)) is not None:
            stem, module = key.removesuffix(ending), name.removesuffix(ending)
            if (partner := tensors.get(stem + PARTNERS[ending])) is None:
                raise ModelFileError(f"The adapter in {folder} has {key} without its other factor; train it again.")
            magnitude = tensors.get(stem + MAGNITUDE)
            if ending == FACTOR_A:
                changes[f"{module}.weight"] = _change(module, tensor, partner, magnitude, settings)
            elif ending == EMBEDDING_A:
                changes[f"{module}.weight"] = _embedding_change(module, tensor, partner, magnitude, settings)
        elif not name.endswith(MAGNITUDE):
            if "lora_" in name or "token_adapter" in name:
                raise ModelFileError(
                    f"{folder} cannot be used exactly: {key} is of a kind that is not known here; {INSTEAD}."
                )
            if ".original_module." not in name:  # what it was before
                replaced[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = tensor
    if not changes and not replaced:
        raise ModelFileError(f"The adapter in {folder} holds no tensor; train it again.")
    return Adapter(changes, replaced)


def _change(module: str, a: Any, b: Any, magnitude: Any | None, settings: Mapping[str, Any]) -> Change:
    if bool(settings.get("use_dora")) != (magnitude is not None):
        raise ModelFileError(f"{module}: use_dora is {settings.get('use_dora')}, which its tensors do not bear out.")
    rank = int(a.shape[0])
    if b.shape[1] != rank:
        raise ModelFileError(f"{module}: one factor has rank {rank}, the other {b.shape[1]}; train the adapter again.")
    alpha = _by_pattern(settings.get("alpha_pattern") or {}, module, settings["lora_alpha"])
    scale = alpha / rank**0.5 if settings.get("use_rslora") else alpha / rank
    return Change(a, b, float(scale), magnitude, bool(settings.get("fan_in_fan_out")))


def _embedding_change(module: str, a: Any, b: Any, magnitude: Any | None, settings: Mapping[str, Any]) -> Change:
    """Of factors `(rank, tokens)` and `(width, rank)`: PEFT adds the transpose of their product (tuners/lora/layer.py)."""
    if magnitude is not None:
        raise ModelFileError(f"{module}: DoRA of embeddings cannot be merged here; {INSTEAD}.")
    change = _change(module, b.T, a.T, None, {**settings, "use_dora": False, "fan_in_fan_out": False})
    return dataclasses.replace(change, is_embedding=True)


def _by_pattern(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """As PEFT looks settings up: a key is a regular expression for the end of a module's name (utils/other.py)."""
    matching = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(matching, otherwise)


def _unusable(settings: Mapping[str, Any]) -> str | None:
    if settings.get("peft_type") != "LORA":
        return f"it is of type {settings.get('peft_type')!r}, not LORA"
    if not isinstance(settings.get("lora_alpha"), int | float):
        return f"lora_alpha is {settings.get('lora_alpha')!r}, which is no number"
    initial = str(settings.get("init_lora_weights", True)).lower()
    if initial.startswith(CHANGED_BASES):
        return (
            f"it belongs to a changed base (init_lora_weights = {initial!r}); save it again with PEFT's"
            " path_initial_model_for_weight_conversion, which makes a plain LoRA adapter of it"
        )
    return next((f"{meaning} ({key})" for key, meaning in UNUSABLE.items() if settings.get(key)), None)
