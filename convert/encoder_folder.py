"""What a model folder in the Hugging Face format is, as an encoder: `describe`. Reads JSON and headers, no weights.

Everything that cannot be exported is refused here, before anything is computed, with the reason and what to do. What
the files do not say, a person says: `Wishes`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from appliance.encoders import TOKENIZER, Activation, EncoderSettings, Kind, Pooling
from appliance.errors import ModelFileError, RecipeError

# Those that transformers 4 and 5 both read, that Optimum exports, and that the tests take through both.
ARCHITECTURES = (
    *("albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet", "roberta"),
    "xlm-roberta",
)
# Their positions begin behind that of the padding token, 1.
LATE_POSITIONS = {"camembert": 2, "mpnet": 2, "roberta": 2, "xlm-roberta": 2}
CLASSIFIER = "ForSequenceClassification"
BARE = ("Model", "ForMaskedLM", "ForPreTraining")
GENERATIVE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
ENTAILMENT = ({"entailment", "neutral", "contradiction"}, {"entailment", "not_entailment"})
# transformers 5 writes `rope_parameters`; transformers 4 ignores that silently and takes a default.
OLD_ROPE = {"rope_theta", "global_rope_theta"}
UNLIMITED = 1_000_000  # tokenizers without a limit say 1e30


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What a person says instead of the model's files."""

    kind: Kind | None = None
    pooling: Pooling | None = None
    labels: tuple[str, ...] = ()
    max_tokens: int | None = None
    query_prefix: str | None = None
    passage_prefix: str | None = None


def describe(folder: Path, wishes: Wishes) -> EncoderSettings:
    """Raises `ModelFileError` for what cannot be exported, `RecipeError` for a wish that does not fit or is missing."""
    facts = _read(folder / "config.json")
    if not facts:
        raise ModelFileError(f"{folder} has no config.json, so it is no model in the Hugging Face format.")
    try:
        return _described(folder, facts, wishes)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # another type than every published file has
        raise ModelFileError(
            f"The JSON files of {folder} say something unheard of ({error!r}); fetch the model again."
        ) from error


def _described(folder: Path, facts: Mapping[str, Any], wishes: Wishes) -> EncoderSettings:
    _require_architecture(folder, facts)
    _require_weights(folder)
    if not (folder / TOKENIZER).is_file():
        raise ModelFileError(
            f"{folder} has no {TOKENIZER}; transformers writes one: AutoTokenizer.from_pretrained(…).save_pretrained(…)."
        )
    labels = _labels(folder, facts, wishes)
    kind = _kind(folder, facts, labels, wishes)
    max_tokens, pad_token_id = _max_tokens(folder, facts, wishes), _pad_token(facts)
    if kind == "embedding":
        pooling, normalize = _pooling(folder, wishes)
        query, passage = _prefixes(folder, wishes)
        if not (width := facts.get("hidden_size") or facts.get("dim")):
            raise ModelFileError(f"{folder / 'config.json'} does not say how wide the vectors are (hidden_size).")
        return EncoderSettings(
            kind=kind,
            max_tokens=max_tokens,
            pad_token_id=pad_token_id,
            width=width,
            pooling=pooling,
            normalize=normalize,
            query_prefix=query,
            passage_prefix=passage,
        )
    if kind == "nli":
        labels = tuple(label.lower() for label in labels)
    return EncoderSettings(
        kind=kind,
        max_tokens=max_tokens,
        pad_token_id=pad_token_id,
        width=len(labels),
        labels=labels,
        activation=_activation(folder, facts, kind),
    )


def _require_architecture(folder: Path, facts: Mapping[str, Any]) -> None:
    kind, name = facts.get("model_type"), _architecture(facts)
    if name.endswith(GENERATIVE) or facts.get("is_decoder") or facts.get("is_encoder_decoder"):
        raise ModelFileError(
            f"{folder} is a generative model ({name or kind}), not an encoder; `appliance convert gguf` converts those."
        )
    if kind not in ARCHITECTURES:
        raise ModelFileError(
            f"{folder}: the architecture {kind!r} is not one that is exported to ONNX here; those are"
            f" {', '.join(ARCHITECTURES)}. Decoders that give vectors go through `appliance convert gguf`."
        )
    if name and not name.endswith((CLASSIFIER, *BARE)):
        raise ModelFileError(f"{folder} is a {name}; only embedding models and …{CLASSIFIER} are exported.")
    if "rope_parameters" in facts and not OLD_ROPE & facts.keys():
        names = "global_rope_theta and local_rope_theta" if kind == "modernbert" else "rope_theta"
        raise ModelFileError(
            f"{folder / 'config.json'} was written by transformers 5: the exporter's transformers 4 would ignore its"
            f" rope_parameters and compute something else. Add {names} with the same values beside it; both versions then"
            " read the same, and the export proves it."
        )


def _require_weights(folder: Path) -> None:
    """Opens the header of each file of weights: a file that was cut short is found at once."""
    from safetensors import SafetensorError, safe_open

    names = {file.name for file in folder.glob("*.safetensors")}
    wanted = set(_read(folder / "model.safetensors.index.json").get("weight_map", {}).values())
    if missing := sorted(wanted - names):
        raise ModelFileError(f"{folder / missing[0]} is missing; fetch the model again.")
    if not names:
        other = next((each.name for each in sorted(folder.glob("pytorch_model*"))), None)
        reason = f"; {other} could carry code and is not read, save it as safetensors" if other else ""
        raise ModelFileError(f"{folder} has no .safetensors file{reason}.")
    for name in sorted(names):
        try:
            with safe_open(folder / name, framework="numpy"):
                pass
        except SafetensorError as error:
            raise ModelFileError(f"{folder / name} is damaged ({error}); fetch the model again.") from error


def _architecture(facts: Mapping[str, Any]) -> str:
    return str((facts.get("architectures") or [""])[0])


def _labels(folder: Path, facts: Mapping[str, Any], wishes: Wishes) -> tuple[str, ...]:
    """The names of the classifier's outputs; empty for a model without one."""
    if not _architecture(facts).endswith(CLASSIFIER):
        if wishes.labels:
            raise RecipeError(f"--labels: {folder} has no classifier, so it has no labels.")
        return ()
    named = facts.get("id2label") or {}
    count = len(named) or int(facts.get("num_labels", 2))
    found = tuple(str(named.get(str(number), f"LABEL_{number}")) for number in range(count))
    if wishes.labels and len(wishes.labels) != count:
        raise RecipeError(f"--labels: {len(wishes.labels)} given, {folder} has {count}: {', '.join(found)}.")
    return wishes.labels or found


def _kind(folder: Path, facts: Mapping[str, Any], labels: Sequence[str], wishes: Wishes) -> Kind:
    found: Kind
    if not _architecture(facts).endswith(CLASSIFIER):
        found = "embedding"
    elif len(labels) == 1:
        found = "reranker"
    else:
        found = "nli" if {label.lower() for label in labels} in ENTAILMENT else "classifier"
    wished = wishes.kind or found
    if wished != found and "embedding" in (wished, found):
        raise RecipeError(f"--kind {wished}: {folder} is a {_architecture(facts)}, which is {found}.")
    if (wished == "reranker") != (len(labels) == 1):
        raise RecipeError(f"--kind {wished}: {folder} has {len(labels)} labels ({', '.join(labels)}), a reranker has one.")
    if wished == "nli" and found != "nli":
        raise RecipeError(
            f"--kind nli: which of {', '.join(labels)} means what? Add --labels with entailment, neutral, contradiction"
            " in the model's order."
        )
    return wished


def _activation(folder: Path, facts: Mapping[str, Any], kind: Kind) -> Activation:
    """What turns outputs into scores; for rerankers as sentence-transformers' CrossEncoder does."""
    if kind != "reranker":
        return "sigmoid" if facts.get("problem_type") == "multi_label_classification" else "softmax"
    own = (facts.get("sentence_transformers") or {}).get("activation_fn")
    name = str(own or facts.get("sbert_ce_default_activation_function") or "Sigmoid").rpartition(".")[2]
    known: dict[str, Activation] = {"Sigmoid": "sigmoid", "Identity": "identity"}
    if name not in known:
        raise ModelFileError(f"{folder / 'config.json'}: a reranker's activation is Sigmoid or Identity here, not {name}.")
    return known[name]


def _max_tokens(folder: Path, facts: Mapping[str, Any], wishes: Wishes) -> int:
    """The wish, or what the model was trained with; neither may exceed its positions."""
    trained, tokenizer = _read(folder / "sentence_bert_config.json"), _read(folder / "tokenizer_config.json")
    if trained.get("do_lower_case") and not tokenizer.get("do_lower_case"):
        raise ModelFileError(
            f"{folder}: do_lower_case of sentence_bert_config.json, which its tokenizer lacks, is not supported."
        )
    said = trained.get("max_seq_length") or tokenizer.get("model_max_length")
    positions = facts.get("max_position_embeddings")
    if positions:
        positions -= LATE_POSITIONS.get(str(facts.get("model_type")), 0)
    if wishes.max_tokens and positions and wishes.max_tokens > positions:
        raise RecipeError(f"--max-tokens {wishes.max_tokens}: {folder} has {positions} positions.")
    limits = [int(limit) for limit in (wishes.max_tokens or said, positions) if limit and limit < UNLIMITED]
    if not limits:
        raise RecipeError(f"{folder} does not say how many tokens it reads; add --max-tokens.")
    return min(limits)


def _pad_token(facts: Mapping[str, Any]) -> int:
    """Only positions look at it, in the architectures that number them from the first that is no padding."""
    found = facts.get("pad_token_id")
    return found if isinstance(found, int) else 1 if facts.get("model_type") in LATE_POSITIONS else 0


def _pooling(folder: Path, wishes: Wishes) -> tuple[Pooling, bool]:
    """How token vectors become one, and whether that is made 1 long, as sentence-transformers' files say."""
    modules = _read_list(folder / "modules.json")
    names = [str(module.get("type")).rpartition(".")[2] for module in modules]
    if other := next((name for name in names if name not in ("Transformer", "Pooling", "Normalize")), None):
        raise ModelFileError(
            f"{folder} ends in a {other} layer (modules.json), which is not exported; choose another model."
        )
    normalize = "Normalize" in names if modules else True
    if wishes.pooling:
        return wishes.pooling, normalize
    if "Pooling" not in names:
        raise RecipeError(
            f"{folder} does not say how a text's vectors become one (modules.json names no pooling);"
            " add --pooling mean, cls or max, as the model's description says."
        )
    path = folder / str(modules[names.index("Pooling")].get("path")) / "config.json"
    facts = _read(path)
    if not facts:
        raise ModelFileError(f"{path} is missing; fetch the model again, or add --pooling mean, cls or max.")
    if facts.get("include_prompt") is False:
        raise ModelFileError(f"{path}: include_prompt = false (a prefix is left out of the pooling) is not supported.")
    if isinstance(mode := facts.get("pooling_mode"), str):
        chosen = [mode]
    else:
        flags = [key for key, value in facts.items() if key.startswith("pooling_mode_") and value is True]
        chosen = [flag.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token") for flag in flags]
    known: dict[str, Pooling] = {name: name for name in get_args(Pooling)}
    if len(chosen) != 1 or chosen[0] not in known:
        raise ModelFileError(f"{path}: pooling by {' and '.join(chosen) or 'nothing'} is not one of {', '.join(known)}.")
    return known[chosen[0]], normalize


def _prefixes(folder: Path, wishes: Wishes) -> tuple[str | None, str | None]:
    """What is put before queries and passages: the wish, or the prompts of sentence-transformers' files, by their names."""
    facts = _read(folder / "config_sentence_transformers.json")
    prompts = facts.get("prompts") or {}
    default = prompts.get(facts.get("default_prompt_name"))
    passage = next((prompts[name] for name in ("document", "passage", "corpus") if prompts.get(name)), default)
    return wishes.query_prefix or prompts.get("query") or default or None, wishes.passage_prefix or passage or None


def _read(path: Path) -> dict[str, Any]:
    """A file's JSON object; empty where there is no such file."""
    found = _parse(path)
    if not isinstance(found, dict | None):
        raise ModelFileError(f"{path} holds no JSON object; fetch the model again.")
    return found or {}


def _read_list(path: Path) -> list[dict[str, Any]]:
    found = _parse(path)
    if not isinstance(found, list | None):
        raise ModelFileError(f"{path} holds no JSON list; fetch the model again.")
    return found or []


def _parse(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path} cannot be read ({error}); fetch the model again.") from error
