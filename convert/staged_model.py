"""A model folder in the form that llama.cpp's converter reads rightly: links to its files, and anew what it would misread.

What is written anew, each of them seen to go wrong without:
- config.json of Falcon 7B, which says `multi_query` and leaves out `num_kv_heads`: transformers fills in the number of
  heads. config.json of GPT-2, which transformers 5 saves without the `n_ctx` that the converter reads.
- tokenizer_config.json of a tokenizer of characters (SentencePiece): the converter takes added tokens from there alone, and
  transformers 5 keeps them in tokenizer.json; whether llama.cpp puts a space before a text is there too.
- tokenizer_config.json of Phi-4, whose class name tells the converter that it is not SentencePiece, and which transformers 5
  saves under another.
- tokenizer.model, where only tokenizer.json was saved: without it all tokens get the same score, and others come out.
"""

import contextlib
import importlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from appliance.errors import ModelFileError
from convert import pre_tokenizer
from convert.checkpoint import Checkpoint
from convert.pre_tokenizer import Table

SETTINGS, TOKENIZER_SETTINGS, PIECES = "config.json", "tokenizer_config.json", "tokenizer.model"
ADDED_TOKEN = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
BPE = 2  # of sentencepiece_model.proto, `TrainerSpec.ModelType`
# The tokens that llama.cpp wants in a Phi-3 vocabulary, or it fails (src/llama-vocab.cpp, "phi-3").
OF_PHI_3 = frozenset({"</s>", "<unk>", "<s>", "<|endoftext|>"})


@contextlib.contextmanager
def staged(model: Checkpoint, tokenizer: Any | None) -> Iterator[Path]:
    """The folder, under the same name, while the block runs; without a tokenizer where none is converted."""
    table = None if tokenizer is None else pre_tokenizer.table(tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / model.folder.resolve().name
        folder.mkdir()
        written = _write(model, table, folder)
        for entry in model.folder.iterdir():
            if entry.name not in written:
                (folder / entry.name).symlink_to(entry.resolve())
        yield folder


def shown_name(model: Checkpoint, tokenizer: Any) -> str | None:
    """The name that the file must have; None where it may have any.

    llama.cpp drops white space behind special tokens only in models that are called Phi-3, whose tokenizer does so.
    """
    table = pre_tokenizer.table(tokenizer)
    if table is None or not pre_tokenizer.is_of_characters(table) or not OF_PHI_3.issubset(tokenizer.get_vocab()):
        return None
    drops_space = any(each["rstrip"] and each["content"] not in OF_PHI_3 for each in table["added_tokens"])
    return f"Phi-3 {model.folder.name}" if drops_space else None


def _write(model: Checkpoint, table: Table | None, folder: Path) -> set[str]:
    """Writes what must differ; returns the names of those files."""
    written: dict[str, Mapping[str, Any]] = {}
    if missing := _missing_settings(model.settings):
        written[SETTINGS] = {**model.settings, **missing}
    settings = _tokenizer_settings(model.folder)
    if table is not None and pre_tokenizer.is_of_characters(table):
        added = {str(each["id"]): {key: each[key] for key in ADDED_TOKEN} for each in table["added_tokens"]}
        written[TOKENIZER_SETTINGS] = {
            **settings,
            "added_tokens_decoder": added,
            "add_prefix_space": starts_with_space(table),
        }
        if not (model.folder / PIECES).is_file():
            (folder / PIECES).write_bytes(_pieces(table, model.folder))
    elif table is not None and "Phi3ForCausalLM" in (model.settings.get("architectures") or []):
        written[TOKENIZER_SETTINGS] = {**settings, "tokenizer_class": "GPT2Tokenizer"}
    for name, content in written.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return {*written, *(each.name for each in folder.iterdir())}


def starts_with_space(table: Table) -> bool:
    """Whether a text behind a special token gets a space before it.

    "first" gives one to the first text alone, which stands behind the token that opens a conversation: so never.
    """
    steps = [*_flat(table.get("normalizer"), "normalizers"), *_flat(table.get("pre_tokenizer"), "pretokenizers")]
    return any(step["type"] == "Prepend" or step.get("prepend_scheme") == "always" for step in steps)


def _flat(node: Any, children: str) -> list[dict[str, Any]]:
    if not node:
        return []
    return [step for child in node[children] for step in _flat(child, children)] if children in node else [node]


def _missing_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    match settings:
        case {"model_type": "falcon"} if settings.get("multi_query", True) and not settings.get("new_decoder_architecture"):
            return {"num_kv_heads": 1}
        case {"model_type": "gpt2", "n_positions": positions} if "n_ctx" not in settings:
            return {"n_ctx": positions}
    return {}


def _tokenizer_settings(folder: Path) -> dict[str, Any]:
    path = folder / TOKENIZER_SETTINGS
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _pieces(table: Table, source: Path) -> bytes:
    """A SentencePiece model of a tokenizer.json: tokens are scored in the order in which their merges stand.

    SentencePiece merges the pair that makes the best-scored token, tokenizer.json the pair that stands first. Raises
    `ModelFileError` for one that merges no pairs.
    """
    if (kind := table["model"]["type"]) != "BPE":
        raise ModelFileError(
            f"{source} has no {PIECES}, and its tokenizer.json is of type {kind}, of which none can be made here (only of"
            f" BPE). Put the {PIECES} of the base model beside the weights."
        )
    format_of: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")  # generated, without types
    piece = format_of.ModelProto.SentencePiece
    model = table["model"]
    places: dict[str, int] = {}
    for place, merge in enumerate(model["merges"]):
        places.setdefault("".join(_pair(merge)), place)
    special = {each["content"] for each in table["added_tokens"] if each["special"]}
    proto = format_of.ModelProto()
    vocabulary = {token: text for text, token in model["vocab"].items()}
    for token in range(max(vocabulary) + 1):
        text = vocabulary.get(token, f"[PAD{token}]")
        score = -float(places.get(text, len(model["merges"])))
        kind = piece.NORMAL
        if text == model.get("unk_token"):
            kind = piece.UNKNOWN
        elif text in special:
            kind = piece.CONTROL
        elif len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kind = piece.BYTE
        elif token not in vocabulary:
            kind = piece.UNUSED
        proto.pieces.add(piece=text, score=score, type=kind)
    proto.trainer_spec.model_type = BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    content: bytes = proto.SerializeToString()
    return content


def _pair(merge: Any) -> Sequence[str]:
    return merge.split(" ") if isinstance(merge, str) else merge
