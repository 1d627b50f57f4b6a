"""Embeddings, and scores of documents for a query, by models made for it. Knows nothing of requests or queues."""

import functools
from collections.abc import Iterator, Sequence

import numpy as np
from llama_cpp import llama_cpp as c

from appliance.errors import EngineFailed, EnvironmentIncomplete, PromptTooLong
from appliance.serving.engine_settings import CAUSAL_POOLING_TOKENS, EngineSettings
from appliance.serving.llama import library
from appliance.serving.llama.batch import Batch
from appliance.serving.llama.model import Model


class PoolingContext:
    """The working memory of an embedding or rerank model. Owns the model; belongs to one thread, but for `abort`."""

    def __init__(self, model: Model, settings: EngineSettings) -> None:
        self._model = model
        self._slots = settings.slots
        self.context_tokens = min(settings.context_tokens, model.trained_context_tokens)
        params = c.llama_context_default_params()
        computed = CAUSAL_POOLING_TOKENS if self._is_divisible else self.context_tokens
        computed += -computed % self._slots  # llama.cpp ends the process over a mean of batches that do not divide evenly
        params.n_ctx = max(settings.cells, computed)
        params.n_batch = params.n_ubatch = computed
        params.n_seq_max = self._slots
        params.n_threads, params.n_threads_batch = settings.threads_decode, settings.threads_prefill
        params.kv_unified = True
        params.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.embeddings = True
        if model.pooling in (None, "none"):
            params.pooling_type = c.LLAMA_POOLING_TYPE_MEAN
        self._context = c.llama_init_from_model(model.handle, params)
        if not self._context:
            raise EnvironmentIncomplete(
                f"No memory for texts of {self.context_tokens} tokens: {library.last_error()}; "
                "lower --slots or --context-tokens."
            )
        self._batch = Batch(c.llama_n_batch(self._context))
        self._abort_flag = library.AbortFlag()
        self._abort_flag.watch(self._context)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text to embed, with those that this model expects at either end."""
        return self._model.tokenize(text, parse_special=False, add_special=True)

    def encode_pair(self, query: str, document: str) -> list[int]:
        """The tokens by which a document is scored: the model's template, or BERT's [CLS] query [SEP] document [SEP]."""
        if self._pair_template is not None:
            return self._filled_template(query, document)
        vocab = self._model.vocab
        first = [c.llama_vocab_bos(vocab)] if c.llama_vocab_get_add_bos(vocab) else []
        end = [c.llama_vocab_eos(vocab)] if c.llama_vocab_get_add_eos(vocab) else []
        separator = [c.llama_vocab_sep(vocab)] if c.llama_vocab_get_add_sep(vocab) else []
        asked, found = (self._model.tokenize(text, parse_special=False) for text in (query, document))
        return [*first, *asked, *end, *separator, *found, *(end or separator)]

    def embed(self, inputs: Sequence[Sequence[int]]) -> list[bytes] | None:
        """A vector of length 1 for each input: float32, little-endian. None when aborted. Raises `PromptTooLong`."""
        vectors = self._pooled(inputs, self._model.embedding_width)
        return None if vectors is None else [_normalized(vector).astype("<f4").tobytes() for vector in vectors]

    def rank(self, query: str, documents: Sequence[str]) -> list[float] | None:
        """A score for each document, as the model gives it: higher is better. None when aborted."""
        return self.score([self.encode_pair(query, document) for document in documents])

    def score(self, pairs: Sequence[Sequence[int]]) -> list[float] | None:
        """As `rank`, for pairs from `encode_pair`."""
        outputs = self._pooled(pairs, c.llama_model_n_cls_out(self._model.handle))
        return None if outputs is None else [float(output[0]) for output in outputs]

    def abort(self) -> None:
        """Makes the computation now running return None early; any thread."""
        self._abort_flag.lift()

    def close(self) -> None:
        c.llama_free(self._context)
        self._model.close()

    @property
    def _is_divisible(self) -> bool:
        """Whether a text may be computed in parts: when nothing but its last token counts."""
        return self._model.is_causal and self._model.pooling in ("last", "rank")

    @functools.cached_property
    def _pair_template(self) -> str | None:
        return self._model.metadata("tokenizer.chat_template.rerank")

    def _filled_template(self, query: str, document: str) -> list[int]:
        """Only the template's own text may name control tokens."""
        tokens: list[int] = []
        before, _, rest = (self._pair_template or "").partition("{query}")
        middle, _, after = rest.partition("{document}")
        for text, is_template in ((before, True), (query, False), (middle, True), (document, False), (after, True)):
            tokens += self._model.tokenize(text, parse_special=is_template)
        return tokens

    def _pooled(self, inputs: Sequence[Sequence[int]], width: int) -> list[np.ndarray] | None:
        self._abort_flag.lower()
        self._check(inputs)
        outputs: list[np.ndarray] = []
        for group in self._groups(inputs):
            found = self._compute(group, width)
            if found is None:
                return None
            outputs += found
        return outputs

    def _check(self, inputs: Sequence[Sequence[int]]) -> None:
        for number, tokens in enumerate(inputs):
            if not 0 < len(tokens) <= self.context_tokens:
                raise PromptTooLong(
                    f"input[{number}] has {len(tokens)} tokens; this model takes 1 to {self.context_tokens}; split it.",
                    param="input",
                )
            self._model.check_tokens(tokens, f"input[{number}]")

    def _groups(self, inputs: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
        """Runs of inputs that fit together: by sequences, and by the tokens held at once."""
        room = c.llama_n_ctx(self._context) if self._is_divisible else self._batch.capacity
        group: list[Sequence[int]] = []
        for tokens in inputs:
            if group and (len(group) == self._slots or sum(map(len, group)) + len(tokens) > room):
                yield group
                group = []
            group.append(tokens)
        if group:
            yield group

    def _compute(self, group: Sequence[Sequence[int]], width: int) -> list[np.ndarray] | None:
        """One row for each input, from as many batches as they take."""
        memory = c.llama_get_memory(self._context)
        if memory:
            c.llama_memory_clear(memory, False)
        outputs = {}
        for parts in self._batches(group):
            self._batch.clear()
            for sequence, start, tokens in parts:
                self._batch.add(tokens, start, sequence, len(tokens))
            if not library.decode(self._context, self._batch.native):
                return None
            for sequence, _, _ in parts:
                pointer = c.llama_get_embeddings_seq(self._context, sequence)
                outputs[sequence] = np.ctypeslib.as_array(pointer, shape=(width,)).copy()
        return [outputs[sequence] for sequence in range(len(group))]

    def _batches(self, group: Sequence[Sequence[int]]) -> Iterator[Sequence[tuple[int, int, Sequence[int]]]]:
        """The parts (sequence, first position, tokens) that fill one batch after the other."""
        parts: list[tuple[int, int, Sequence[int]]] = []
        left = self._batch.capacity
        for sequence, tokens in enumerate(group):
            start = 0
            while start < len(tokens):
                part = tokens[start : start + left]
                parts.append((sequence, start, part))
                start, left = start + len(part), left - len(part)
                if left == 0:
                    yield parts
                    parts, left = [], self._batch.capacity
        if parts:
            yield parts


def _normalized(vector: np.ndarray) -> np.ndarray:
    length = float(np.linalg.norm(vector))
    if not np.isfinite(length) or length == 0.0:
        raise EngineFailed("The model computed a vector without a direction; its file may be damaged: verify its sha256.")
    return vector / length
