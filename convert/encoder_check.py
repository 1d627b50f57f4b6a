"""Compares an exported encoder with its PyTorch model: `reference`, then `compare` for each of its files.

The model is read and run by this environment's transformers, the ONNX file was made by another version of it: what one of
them reads wrongly shows as a difference. PyTorch computes every text alone, without padding; the encoder computes them as it
will in service, in batches and lengths that the exporter never saw.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appliance.encoders import Encoder, EncoderSettings, Text, activated, normalized, pool
from appliance.errors import ModelFileError, VerificationFailed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

TOLERANCE = 1e-4  # of the largest value that PyTorch computes, or of 1 where that is more
MOST_TOKENS = 512  # of the long text; attention takes memory by the square of it
MOST_SHOWN = 3

TEXTS = (
    "Waar kan ik vannacht slapen?",
    "De opvang aan de Tinlepelhof is open van 17.00 tot 9.00 uur.",
    "Ik heb morgen een sollicitatiegesprek en zou graag eerst willen douchen.",
    "Handdoeken en zeep krijgt u gratis bij de balie.",
    "Mag mijn hond mee naar binnen?",
    "Nee.",
    "De dokter is er elke dinsdag; u hoeft geen afspraak te maken, maar kom op tijd, want het is druk.",
    "Where can I get something to eat?",
    "Soup is served at noon in the canteen, and on Sundays there is bread to take away.",
    "I lost my passport on the train.",
    "The office helps with forms; bring any paper you have, even an old one.",
    "Is there a place to charge my phone?",
    "Yes, at the front desk.",
    "Gdzie mogę się umyć i dostać ręcznik?",
    "Łaźnia jest otwarta w poniedziałek, środę i piątek od 10:00 do 14:00.",
    "Czy ktoś tutaj mówi po polsku?",
    "W czwartki przychodzi tłumacz, który pomaga też przy listach z urzędu.",
    "أين يمكنني أن أنام الليلة؟",
    "المأوى مفتوح من الساعة الخامسة مساءً حتى التاسعة صباحًا.",
    "هل يوجد طبيب هنا؟",
    "Call 112 if somebody is in danger; do not wait for the desk.",
    "€ 2,50 per dag, of gratis met een pasje (nr. 12-B).",
    "ok",
)


@dataclass(frozen=True, slots=True)
class Reference:
    """Texts, or pairs of them, with their token ids and what PyTorch computes for each: see `Encoder.outputs`."""

    texts: Sequence[Text]
    token_ids: Sequence[list[int]]
    outputs: Sequence["Floats"]

    @property
    def longest_tokens(self) -> int:
        return max(map(len, self.token_ids))


def reference(folder: Path, settings: EncoderSettings) -> Reference:
    """Runs the PyTorch model; raises `ModelFileError` for a checkpoint that is not whole or does not load."""
    import torch

    tokenizer, model = _load(folder, settings)
    single = [*TEXTS, _long_text(tokenizer, min(settings.max_tokens, MOST_TOKENS))]
    texts: Sequence[Text] = single
    if settings.kind in ("reranker", "nli"):
        long_pair = (TEXTS[0], _long_text(tokenizer, min(settings.max_tokens, MOST_TOKENS), TEXTS[0]))
        texts = [*zip(TEXTS, TEXTS[1:] + TEXTS[:1], strict=True), long_pair]
    accepted = inspect.signature(model.forward).parameters
    token_ids, outputs = [], []
    with torch.inference_mode():
        for text in texts:
            pair = (text,) if isinstance(text, str) else text
            tokens = tokenizer(*pair, padding=False, truncation=True, max_length=settings.max_tokens, return_tensors="pt")
            result = model(**{name: value for name, value in tokens.items() if name in accepted})
            found = result.last_hidden_state if settings.kind == "embedding" else result.logits
            token_ids.append(tokens["input_ids"][0].tolist())
            outputs.append(found[0].numpy())
    if (width := outputs[0].shape[-1]) != settings.width:
        raise ModelFileError(f"{folder} gives {width} values, but its config.json says {settings.width}.")
    return Reference(texts, token_ids, outputs)


def compare(expected: Reference, encoder: Encoder) -> dict[str, Any]:
    """How far an encoder's outputs are from PyTorch's.

    Raises `VerificationFailed` when it reads other tokens, or cannot compute a shape.
    """
    import numpy as np

    found_ids = encoder.token_ids(expected.texts)
    if other := [i for i, ids in enumerate(expected.token_ids) if ids != found_ids[i]]:
        i = other[0]
        raise VerificationFailed(
            f"tokenizer.json gives other tokens than transformers for {len(other)} of {len(found_ids)} texts, first for"
            f" {str(expected.texts[i])[:60]!r}: {found_ids[i][:9]} instead of {expected.token_ids[i][:9]}. Nothing was kept."
        )
    try:
        # The long one by itself, or all that share its batch would be padded to its length.
        outputs = dict(encoder.outputs(expected.texts[:-1], truncate=True))
        outputs[len(outputs)] = dict(encoder.outputs(expected.texts[-1:], truncate=True))[0]
    except ModelFileError as error:
        raise VerificationFailed(f"The export does not run: {error} Nothing was kept.") from error
    found = [outputs[i] for i in range(len(outputs))]
    differences = [float(np.abs(a - b).max()) for a, b in zip(expected.outputs, found, strict=True)]
    results = {"largest_difference": max(differences)}
    return results | _agreement(expected.outputs, found, encoder.settings)


def require_equal(results: Mapping[str, Any], expected: Reference, model: Path, versions: Mapping[str, str]) -> None:
    """Raises `VerificationFailed` when the fp32 file is further from PyTorch than rounding explains."""
    import transformers

    largest = max(float(abs(output).max()) for output in expected.outputs)
    limit = TOLERANCE * max(1.0, largest)
    if not results["largest_difference"] <= limit:
        raise VerificationFailed(
            f"The ONNX file does not compute what {model} does: outputs differ by {results['largest_difference']:.2g}, the"
            f" limit is {limit:.2g} ({len(expected.texts)} texts of up to {expected.longest_tokens} tokens). transformers"
            f" {transformers.__version__} computed the one, {versions.get('transformers')} exported the other: one reads the"
            " checkpoint wrongly, or the export is bound to one shape. Nothing was kept."
        )


def _agreement(expected: Sequence["Floats"], found: Sequence["Floats"], settings: EncoderSettings) -> dict[str, float]:
    """What the differences mean for whoever uses the results."""
    import numpy as np

    if settings.kind == "embedding":
        a, b = (
            normalized(np.stack([pool(hidden, settings.pooling) for hidden in outputs])) for outputs in (expected, found)
        )
        cosines = (a * b).sum(axis=1)
        nearest = [np.argmax(vectors @ vectors.T - 2 * np.eye(len(vectors)), axis=1) for vectors in (a, b)]
        return {
            "least_cosine": float(cosines.min()),
            "mean_cosine": float(cosines.mean()),
            "same_nearest_ratio": float((nearest[0] == nearest[1]).mean()),
        }
    a, b = (np.stack([activated(logits, settings.activation) for logits in outputs]) for outputs in (expected, found))
    results = {"largest_score_difference": float(np.abs(a - b).max())}
    if settings.kind == "reranker":
        orders = [np.sign(scores[:, 0][:, None] - scores[:, 0][None, :]) for scores in (a, b)]
        return results | {"same_order_ratio": float((orders[0] == orders[1]).mean())}
    return results | {"same_label_ratio": float((a.argmax(axis=1) == b.argmax(axis=1)).mean())}


def _load(folder: Path, settings: EncoderSettings) -> tuple[Any, Any]:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    loader = AutoModel if settings.kind == "embedding" else AutoModelForSequenceClassification
    options = {"dtype": torch.float32, "local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, report = loader.from_pretrained(folder, attn_implementation="eager", **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelFileError(f"{folder} cannot be loaded by transformers: {reason}") from error
    # A pooler is what BERT adds for its own training; no vector here is made by it.
    missing = sorted(key for key in report["missing_keys"] if settings.kind != "embedding" or "pooler." not in key)
    if missing:
        shown = ", ".join(missing[:MOST_SHOWN])
        raise ModelFileError(
            f"{folder} lacks {len(missing)} weights ({shown}), which would be filled at random; fetch the model again."
        )
    return tokenizer, model.eval()


def _long_text(tokenizer: Any, tokens: int, first: str | None = None) -> str:
    """As many of the texts as fit into so many tokens, with those of `first` where it makes a pair."""
    chosen = ""
    for text in TEXTS * (tokens // 4 + 1):
        longer = f"{chosen} {text}".strip()
        pair = (longer,) if first is None else (first, longer)
        if len(tokenizer(*pair, padding=False, truncation=False)["input_ids"]) > tokens:
            break
        chosen = longer
    return chosen or TEXTS[-1]
