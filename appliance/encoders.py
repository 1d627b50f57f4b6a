"""Encoders on ONNX Runtime: vectors, reranking, entailment and classification, without torch. Entry: `Encoder.load`.

The only file that imports onnxruntime. A folder made by `appliance convert onnx` says in encoder.json what its model is
and how its numbers are read. This file knows nothing of documents or languages, nor from which score on a passage is good.
"""

import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from appliance import artifacts, config, device
from appliance.artifacts import Artifact
from appliance.config import setting
from appliance.errors import EngineFailed, ModelFileError, PromptTooLong, RequestError, several

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

logger = logging.getLogger(__name__)

SCHEMA = 1
SETTINGS = "encoder.json"
TOKENIZER = "tokenizer.json"
MODELS = {"fp32": "model.onnx", "int8": "model-int8.onnx"}
# What one batch may hold, padding included: it bounds the memory of a call, whatever the number of texts. More tokens are
# slower, not faster: at 10 texts of 256 they leave the CPU's caches, and take twice as long as one after another.
BATCH_TEXTS = {"fp32": 16, "int8": 1}  # int8 scales by the largest value of a batch: alone, a text has one result
BATCH_TOKENS = 1024
# So many texts are tokenized at a time: their tokens are kept until they are computed.
WINDOW_TEXTS = 256

Kind = Literal["embedding", "reranker", "nli", "classifier"]
Pooling = Literal["mean", "cls", "max"]
Activation = Literal["identity", "sigmoid", "softmax"]
Precision = Literal["int8", "fp32"]
Text = str | tuple[str, str]
T = TypeVar("T", bound=Text)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSettings:
    """What encoder.json says: all that a model's numbers mean."""

    kind: Kind = setting()
    max_tokens: int = setting(minimum=4, about="tokens of one input, the special ones included")
    width: int = setting(minimum=1, about="numbers of a vector, or labels")
    pad_token_id: int = setting(0, minimum=0)
    pooling: Pooling = setting("mean", about="how the vectors of a text's tokens become one; embeddings only")
    normalize: bool = setting(True, about="whether vectors are made 1 long; embeddings only")
    query_prefix: str | None = setting(None, about="put before what is searched for")
    passage_prefix: str | None = setting(None, about="put before what is found")
    labels: tuple[str, ...] = setting((), about="in the order of the model's outputs; all but embeddings")
    activation: Activation = setting("softmax", about="what turns outputs into scores; all but embeddings")


class Encoder:
    """A loaded model. Any number of threads may use one; a call holds one batch in memory, beside its results."""

    def __init__(self, folder: Path, settings: EncoderSettings, precision: Precision, tokenizer: Any, session: Any) -> None:
        self.folder, self.settings, self.precision = folder, settings, precision
        self._tokenizer, self._session = tokenizer, session
        self._inputs = [each.name for each in session.get_inputs()]

    @classmethod
    def load(cls, folder: Path, precision: Precision = "int8", threads: int | None = None) -> Self:
        """Opens an artifact of kind `encoder`, or a folder with its files; `threads` default to the physical cores.

        Raises `ModelFileError` for what is missing, damaged or no encoder, `ArtifactError` for a file that has changed.
        """
        settings = read_settings(folder)
        model = folder / MODELS[precision]
        for file in (model, folder / TOKENIZER):
            if not file.is_file():
                raise ModelFileError(f"{file} is missing; make the encoder again with `appliance convert onnx`.")
        _check_digests(folder, (model.name, TOKENIZER, SETTINGS))
        tokenizer = _open_tokenizer(folder / TOKENIZER, settings.max_tokens)
        session = _open_session(model, threads or device.physical_cores())
        encoder = cls(folder, settings, precision, tokenizer, session)
        if unknown := set(encoder._inputs) - {"input_ids", "attention_mask", "token_type_ids"}:
            raise ModelFileError(f"{model} asks for {', '.join(sorted(unknown))}, so it is no encoder of texts.")
        return encoder

    def embed(self, texts: Sequence[str], kind: Literal["query", "passage"], *, truncate: bool = False) -> "Floats":
        """The vectors `(texts, width)`, float32, in the order given; 1 long where the model's settings say so.

        Queries and passages get the prefixes that the model was trained with. A text above `max_tokens` raises
        `PromptTooLong`; with `truncate` it is cut, and the log says how many were.
        """
        import numpy as np

        self._require("embedding")
        settings = self.settings
        prefix = (settings.query_prefix if kind == "query" else settings.passage_prefix) or ""
        vectors = np.empty((len(texts), settings.width), dtype=np.float32)
        for position, hidden in self.outputs([prefix + text for text in _several(texts)], truncate=truncate):
            vectors[position] = pool(hidden, settings.pooling)
        return normalized(vectors) if settings.normalize else vectors

    def score(self, query: str, passages: Sequence[str], *, truncate: bool = False) -> list[float]:
        """How well each passage answers the query, in the order given; more is better.

        From 0 to 1, or any number where the model's activation is the identity. Too long pairs as in `embed`; what is
        cut is the longer of the two.
        """
        self._require("reranker")
        scores = [0.0] * len(passages)
        for position, logits in self.outputs([(query, passage) for passage in _several(passages)], truncate=truncate):
            scores[position] = float(activated(logits, self.settings.activation)[0])
        return scores

    def classify(self, texts: Sequence[Text], *, truncate: bool = False) -> list[dict[str, float]]:
        """The probability of each label, for each text or pair (premise, hypothesis), in the order given.

        They add up to 1, unless the model judges each label by itself (activation `sigmoid`). Too long ones as in `embed`.
        """
        self._require("nli", "classifier")
        found: list[dict[str, float]] = [{}] * len(texts)
        for position, logits in self.outputs(_several(texts), truncate=truncate):
            values = activated(logits, self.settings.activation)
            found[position] = dict(zip(self.settings.labels, map(float, values), strict=True))
        return found

    def token_ids(self, texts: Sequence[Text]) -> list[list[int]]:
        """What the model reads of each text: its token ids with the special ones, cut at `max_tokens`."""
        return [list(each.ids) for each in self._encode(texts)]

    def outputs(self, texts: Sequence[Text], *, truncate: bool = False) -> Iterator[tuple[int, "Floats"]]:
        """What the model computes, in any order: the position of a text, and its output without padding, float32.

        That is `(tokens, width)` for embeddings, before pooling; `(width,)` for all others, before the activation.
        """
        for start in range(0, len(texts), WINDOW_TEXTS):
            encodings = self._encode(texts[start : start + WINDOW_TEXTS])
            self._refuse_or_report([start + i for i, each in enumerate(encodings) if each.overflowing], truncate)
            for batch in batches([len(each.ids) for each in encodings], BATCH_TEXTS[self.precision]):
                for place, output in zip(batch, self._compute([encodings[i] for i in batch]), strict=True):
                    yield start + place, output

    def _encode(self, texts: Sequence[Text]) -> list[Any]:
        try:
            encodings: list[Any] = self._tokenizer.encode_batch_fast(list(texts))
        except (TypeError, UnicodeError) as error:  # half of a surrogate pair, for example
            raise RequestError(f"A text is no valid Unicode text, so it has no tokens: {error}") from error
        return encodings

    def _refuse_or_report(self, too_long: Sequence[int], truncate: bool) -> None:
        if not too_long:
            return
        if not truncate:
            which = f"Text {too_long[0] + 1}" + (f" and {len(too_long) - 1} more" if len(too_long) > 1 else "")
            raise PromptTooLong(
                f"{which}: longer than the {self.settings.max_tokens} tokens that {self.folder.name} reads; divide it."
            )
        logger.warning("event=texts_truncated encoder=%s texts=%d", self.folder.name, len(too_long))

    def _compute(self, encodings: Sequence[Any]) -> Iterator["Floats"]:
        """The outputs of one batch, without padding."""
        import numpy as np

        shape = (len(encodings), max(len(each.ids) for each in encodings))
        feeds = {name: np.zeros(shape, dtype=np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
        feeds["input_ids"][:] = self.settings.pad_token_id
        for row, each in enumerate(encodings):
            length = len(each.ids)
            feeds["input_ids"][row, :length] = each.ids
            feeds["attention_mask"][row, :length] = 1
            feeds["token_type_ids"][row, :length] = each.type_ids
        output = self._run({name: feeds[name] for name in self._inputs}, shape)
        is_embedding, width = self.settings.kind == "embedding", self.settings.width
        if output.shape != ((*shape, width) if is_embedding else (shape[0], width)):
            raise ModelFileError(
                f"{self.folder} gives {output.shape} for {shape[0]} texts of {shape[1]} tokens, but its {SETTINGS} says"
                f" width = {width}; make it again with `appliance convert onnx`."
            )
        for row, each in enumerate(encodings):
            found = output[row, : len(each.ids)] if is_embedding else output[row]
            if not np.isfinite(found).all():
                raise ModelFileError(f"{self.folder} computes values that are no numbers; take another precision or model.")
            yield found

    def _run(self, feeds: dict[str, Any], shape: tuple[int, int]) -> "Floats":
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        try:
            output: Floats = self._session.run(None, feeds)[0]
        except (state.InvalidArgument, state.Fail, state.NotImplemented) as error:
            raise ModelFileError(
                f"{self.folder} cannot compute {shape[0]} texts of {shape[1]} tokens: {_first_line(error)}"
            ) from error
        except (state.RuntimeException, state.EPFail, MemoryError) as error:
            raise EngineFailed(
                f"ONNX Runtime failed at {shape[0]} texts of {shape[1]} tokens ({_first_line(error)}); free some memory."
            ) from error
        return output

    def _require(self, *kinds: Kind) -> None:
        if self.settings.kind not in kinds:
            raise ModelFileError(f"{self.folder} is of kind {self.settings.kind}; this needs {' or '.join(kinds)}.")


def batches(lengths: Sequence[int], most_texts: int) -> Iterator[list[int]]:
    """Positions in batches of so many texts and, padded to the longest, BATCH_TOKENS; a longer text has its own.

    Sorted by length, so that little is padded, and the longest first, so that memory that is missing is missed at once.
    """
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    while order:
        size = max(1, min(most_texts, BATCH_TOKENS // max(1, lengths[order[0]])))
        yield order[:size]
        order = order[size:]


def _several(texts: Sequence[T]) -> Sequence[T]:
    """A single text is a sequence of texts too, of one letter each, and never meant."""
    if isinstance(texts, str):
        raise TypeError("expected a sequence of texts, not one text")
    return texts


def pool(hidden: "Floats", pooling: Pooling) -> "Floats":
    """One vector `(width,)` of a text's token vectors `(tokens, width)`."""
    pooled: Floats = {"mean": lambda: hidden.mean(axis=0), "cls": lambda: hidden[0], "max": lambda: hidden.max(axis=0)}[
        pooling
    ]()
    return pooled


def normalized(vectors: "Floats") -> "Floats":
    """Vectors `(n, width)` made 1 long; zero stays zero."""
    import numpy as np

    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Floats = vectors / np.maximum(lengths, np.float32(1e-12))
    return unit


def activated(logits: "Floats", activation: Activation) -> "Floats":
    """Scores `(width,)` of a model's outputs `(width,)`."""
    import numpy as np

    if activation == "identity":
        return logits
    if activation == "sigmoid":
        scores: Floats = np.exp(-np.logaddexp(np.float32(0), -logits))  # 1 / (1 + exp(-x)) without overflow
        return scores
    powers = np.exp(logits - logits.max())
    shares: Floats = powers / powers.sum()
    return shares


def read_settings(folder: Path) -> EncoderSettings:
    """Reads encoder.json; raises `ModelFileError` with every mistake in it."""
    path = folder / SETTINGS
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelFileError(f"{folder} is no encoder: it has no {SETTINGS}; `appliance convert onnx` makes one.") from error
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path} cannot be read ({error}); make the encoder again.") from error
    if not isinstance(table, dict) or table.pop("schema", None) != SCHEMA:
        raise ModelFileError(f"{path} is not of schema {SCHEMA}; make the encoder again with `appliance convert onnx`.")
    problems: list[str] = []
    settings = config.build(EncoderSettings, table, "", problems)
    if settings is not None and settings.kind != "embedding" and len(settings.labels) != settings.width:
        problems.append(f"labels: {len(settings.labels)} of them, but width = {settings.width}")
    if settings is None or problems:
        raise ModelFileError(several(problems, f"{path} is damaged"))
    return settings


def write_settings(folder: Path, settings: EncoderSettings) -> None:
    text = json.dumps({"schema": SCHEMA, **config.plain(settings)}, indent=2, ensure_ascii=False)
    (folder / SETTINGS).write_text(text + "\n", encoding="utf-8")


def _check_digests(folder: Path, names: Sequence[str]) -> None:
    """Compares the files that are read, and no others, with the manifest; a foreign folder has none and passes."""
    if not (folder / artifacts.MANIFEST).exists():
        return
    manifest = artifacts.load(folder).manifest
    # A model above 2 GB keeps its weights beside it, as model.onnx_data.
    files = {name: file for name, file in manifest["files"].items() if name.removesuffix("_data") in names}
    artifacts.check_files(Artifact(folder, {**manifest, "files": files}))


def _open_tokenizer(path: Path, max_tokens: int) -> Any:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more precise
        raise ModelFileError(f"{path} is no tokenizer ({_first_line(error)}); make the encoder again.") from error
    tokenizer.no_padding()  # a published tokenizer may pad every text to a fixed length
    tokenizer.enable_truncation(max_tokens)
    return tokenizer


def _open_session(model: Path, threads: int) -> Any:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Both keep memory for later batches and never give it back; texts differ in length, so it would only grow.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    # Threads that spin while they wait take the cores from the model that answers.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except (
        *(state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf, state.NoModel, state.NoSuchFile),
        *(state.NotImplemented, state.RuntimeException),
    ) as error:
        raise ModelFileError(f"{model} cannot be opened ({_first_line(error)}); make the encoder again.") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
