"""A model folder in the Hugging Face format, checked before anything is made of it: settings, shards, tensors, tokenizer."""

import collections
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.errors import ModelFileError
from convert import safetensors_file
from convert.safetensors_file import Entry

INDEX = "model.safetensors.index.json"
# Vocabularies are rounded up, for speed or for tokens to come: Qwen2.5-7B has 152,064 rows for 151,665 tokens,
# deepseek-llm-7b 102,400 for 100,016. More than this is another model's tokenizer.
LARGEST_PADDING = 4096
# What transformers' models for texts call their embeddings; the last three are Mamba's, OpenAI GPT's and ModernBERT's.
EMBEDDINGS = (
    *("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight"),
    *(".embeddings.weight", "tokens_embed.weight", "tok_embeddings.weight"),
)
HEAD = "lm_head.weight"
HEADS = (HEAD, "embed_out.weight")  # files of GPT-NeoX say embed_out, and transformers renames it as it loads
# The same weight has other first words in other files, and transformers renames them as it loads: openai-community/gpt2 has
# no "transformer.", Gemma 3 of 4B and more has "language_model.model." where its code has "model.language_model.",
# Nemotron-H "backbone." for "model.".
FIRST_WORDS = frozenset({"model", "transformer", "language_model", "gpt_neox", "backbone"})
OPTIONAL_WORD = "vision_model"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What the files of a model say; tensors by name, over all shards."""

    folder: Path
    settings: Mapping[str, Any]
    shards: Sequence[Path]
    tensors: Mapping[str, Entry]
    by_stem: Mapping[str, str]  # names in the files, by what is the same in all of them

    def stored_name(self, name: str) -> str | None:
        """What the files call a weight that transformers or an adapter calls `name`; None where they have none such."""
        return name if name in self.tensors else self.by_stem.get(stem(name))

    @property
    def size_bytes(self) -> int:
        return sum(shard.stat().st_size for shard in self.shards)

    @property
    def text_settings(self) -> Mapping[str, Any]:
        """Those of the language model, which multimodal models keep apart."""
        inner = self.settings.get("text_config")
        return inner if isinstance(inner, Mapping) else self.settings

    @property
    def is_tied(self) -> bool:
        """Whether one matrix serves as embeddings and as head: as the settings say, even where the head is stored too."""
        has_head = any(name.endswith(HEADS) for name in self.tensors)
        inner = self.text_settings.get("tie_word_embeddings")
        return not has_head or bool(self.settings.get("tie_word_embeddings") if inner is None else inner)


def read(folder: Path) -> Checkpoint:
    """Raises `ModelFileError` for a folder that is no whole model in 16 or 32 bits."""
    settings = read_settings(folder)
    if quantization := settings.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else quantization
        raise ModelFileError(
            f"{folder} is quantized already ({method}), which cannot be converted; fetch the 16-bit model that it was made"
            " from and name that. An adapter that was trained on the quantized one fits it."
        )
    shards = _shards(folder)
    tensors: dict[str, Entry] = {}
    for shard in shards:
        tensors.update(safetensors_file.read_header(shard).tensors)
    stems = collections.Counter(map(stem, tensors))
    by_stem = {stem(name): name for name in tensors if stems[stem(name)] == 1}
    return Checkpoint(folder, settings, shards, tensors, by_stem)


def stem(name: str) -> str:
    """A weight's name without the words that differ from file to file."""
    words = [word for word in name.split(".") if word != OPTIONAL_WORD]
    same = ".".join(itertools.dropwhile(FIRST_WORDS.__contains__, words))
    return HEAD if same in HEADS else same


def read_settings(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelFileError(f"{folder} has no config.json, so it is no model in the Hugging Face format.")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelFileError(f"{path} is not a JSON object: {error}.") from error
    if not isinstance(settings, dict):
        raise ModelFileError(f"{path} is not a JSON object: it holds {settings!r}.")
    return settings


def check_vocabulary(model: Checkpoint, tokens: int) -> None:
    """Raises `ModelFileError` where a tokenizer of so many tokens is not this model's.

    Fewer tokens than embeddings is how vocabularies are padded; many fewer is another tokenizer.
    """
    rows = next((entry.shape[0] for name, entry in model.tensors.items() if name.endswith(EMBEDDINGS)), None)
    if rows is None:
        return
    if tokens > rows:
        raise ModelFileError(
            f"{model.folder}: the tokenizer has {tokens} tokens, the embeddings {rows} rows; tokens were added and the"
            " embeddings not resized (resize_token_embeddings), so that the new ones have no meaning."
        )
    if rows - tokens > LARGEST_PADDING:
        raise ModelFileError(
            f"{model.folder}: the tokenizer has {tokens} tokens, the embeddings {rows} rows: {rows - tokens} more, which no"
            " padding explains; the tokenizer is another model's. Put the right tokenizer files beside the weights."
        )


def _shards(folder: Path) -> Sequence[Path]:
    found = sorted(folder.glob("*.safetensors"))
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelFileError(f"{index} cannot be read ({error}); fetch the model again.") from error
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ModelFileError(
                f"{folder} lacks {missing[0]} ({len(missing)} of {len(names)} shards are missing); fetch the model again."
            )
        return [folder / name for name in names]
    if not found:
        raise ModelFileError(f"{folder} has no .safetensors file; other formats are not read.")
    whole = folder / "model.safetensors"  # beside it Mistral's models have the same weights in a file of their own format
    return [whole] if whole in found else found
