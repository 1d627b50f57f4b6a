"""Draws the tokens of one answer: bias, grammar, penalties, then llama.cpp's sampler chain. One per slot."""

import ctypes
import logging
import math
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as c

from appliance.errors import EngineFailed, RequestError
from appliance.serving.decoder import IDLE_CHUNK_TOKENS, Sampled
from appliance.serving.grammar import Gate, GrammarStuck
from appliance.serving.requests import SamplingSettings
from appliance.serving.sampling import (
    Bias,
    Logits,
    LogProbabilities,
    Penalties,
    TokenIds,
    forbid,
    likeliest,
    without_hopeless,
)

SEEDS = 0xFFFFFFFF  # llama.cpp takes this very number for "any seed"
LOWEST_TEMPERATURE = 1e-3  # below, only the likeliest token is ever drawn; much below, quotients are no numbers any more
CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data

_log = logging.getLogger(__name__)


def check(sampling: SamplingSettings, token_count: int) -> None:
    """Raises `RequestError` for a bias on a token that the vocabulary does not have."""
    if wrong := [token for token in sampling.logit_bias if not 0 <= token < token_count]:
        raise RequestError(
            f"logit_bias: token id {wrong[0]} does not exist; this model's ids are 0 to {token_count - 1}.",
            param="logit_bias",
        )


class Candidates:
    """The array that a sampler chain works on; one for all slots, since they are sampled one after the other."""

    def __init__(self, token_count: int) -> None:
        self._records = np.zeros(token_count, dtype=CANDIDATE)
        self._all = np.arange(token_count, dtype=np.int32)

    def draw(self, chain: Any, logits: Logits, allowed: TokenIds | None, trimmed_at: float | None) -> int:
        """A token by the chain; `trimmed_at` is its temperature when nothing in it cuts the many unlikely ones off early."""
        ids, values = (self._all, logits) if allowed is None else (allowed, logits[allowed])
        if trimmed_at is not None:
            ids, values = without_hopeless(ids, values, trimmed_at)
        records = self._records[: len(ids)]
        records["id"], records["logit"] = ids, values
        pointer = records.ctypes.data_as(ctypes.POINTER(c.llama_token_data))
        array = c.llama_token_data_array(data=pointer, size=len(ids), selected=-1, sorted=False)
        c.llama_sampler_apply(chain, ctypes.byref(array))
        return int(records["id"][array.selected])


class SlotSampler:
    """The sampler of one answer. Its state moves on with each token that `sample` returns, and with forced ones."""

    def __init__(
        self,
        sampling: SamplingSettings,
        *,
        candidates: Candidates,
        end_tokens: TokenIds,
        gate: Gate | None,
        top_logprobs: int | None,
    ) -> None:
        self._candidates, self._end_tokens, self._gate, self._top = candidates, end_tokens, gate, top_logprobs
        self._bias = Bias(sampling.logit_bias) if sampling.logit_bias else None
        is_penalized = sampling.presence_penalty or sampling.frequency_penalty or sampling.repeat_penalty != 1.0
        self._penalties = (
            Penalties(
                repeat=sampling.repeat_penalty,
                frequency=sampling.frequency_penalty,
                presence=sampling.presence_penalty,
            )
            if is_penalized
            else None
        )
        is_cut_early = sampling.top_k > 0 or sampling.min_p > 0.0
        self._trimmed_at = None if is_cut_early else sampling.temperature
        self._chain = None if sampling.temperature < LOWEST_TEMPERATURE else _chain(sampling)
        changes = (self._bias, self._gate, self._penalties, self._chain)
        self._is_plain = all(each is None for each in changes)  # greedy, and nothing changes what the model says

    def sample(self, logits: Logits) -> Sampled:
        """Draws the next token; changes `logits`. Raises `EngineFailed` when they are no numbers.

        When the grammar leaves no token, the answer cannot go on: an end token is returned, marked with the reason.
        """
        if (decided := self._next_forced()) is not None:
            self._accept(decided)
            return Sampled(decided)
        likeliest_of_all = int(logits.argmax())  # or the first that is no number, if there is one
        if not math.isfinite(logits.item(likeliest_of_all)):
            raise EngineFailed("The model computed values that are no numbers; its file may be damaged: verify its sha256.")
        probabilities = None if self._top is None else LogProbabilities(logits, self._top)
        if self._bias is not None:
            self._bias.apply(logits)
        try:
            token = likeliest_of_all if self._is_plain else self._pick(logits)
        except GrammarStuck as stuck:
            _log.warning("event=grammar_stuck reason=%r", str(stuck))
            return Sampled(int(self._end_tokens[0]), failure=f"The grammar cannot go on: {stuck}")
        self._accept(token)
        if probabilities is None:
            return Sampled(token)
        return Sampled(token, probabilities.of(token), probabilities.likeliest())

    def forced(self) -> Sequence[int]:
        """No more than one batch takes: a grammar may decide 100,000 tokens of an answer that may have 10."""
        tokens: list[int] = []
        while len(tokens) < IDLE_CHUNK_TOKENS and (token := self._next_forced()) is not None:
            self._accept(token)
            tokens.append(token)
        return tokens

    def close(self) -> None:
        if self._chain is not None:
            c.llama_sampler_free(self._chain)
            self._chain = None

    def _pick(self, logits: Logits) -> int:
        allowed = None
        if self._gate is not None:
            allowed = self._gate.allowed()
            if self._gate.is_end_forbidden:
                forbid(logits, self._end_tokens)
        if self._penalties is not None:
            self._penalties.apply(logits)
        while True:
            token = likeliest(logits, allowed)
            if token is None:  # biases of -100 may forbid all that the grammar allows
                raise GrammarStuck("the logit biases forbid every token that fits")
            if self._chain is not None:
                token = self._candidates.draw(self._chain, logits, allowed, self._trimmed_at)
            if self._gate is None or self._gate.permits(token):
                return token
            logits[token] = -np.inf

    def _next_forced(self) -> int | None:
        return None if self._gate is None or self._top is not None else self._gate.next_forced()

    def _accept(self, token: int) -> None:
        if self._gate is not None:
            self._gate.accept(token)
        if self._penalties is not None:
            self._penalties.add(token)


def _chain(sampling: SamplingSettings) -> Any:
    chain = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
    if sampling.top_k > 0:
        c.llama_sampler_chain_add(chain, c.llama_sampler_init_top_k(sampling.top_k))
    if sampling.top_p < 1.0:
        c.llama_sampler_chain_add(chain, c.llama_sampler_init_top_p(sampling.top_p, 1))
    if sampling.min_p > 0.0:
        c.llama_sampler_chain_add(chain, c.llama_sampler_init_min_p(sampling.min_p, 1))
    c.llama_sampler_chain_add(chain, c.llama_sampler_init_temp(sampling.temperature))
    seed = secrets.randbelow(SEEDS) if sampling.seed is None else sampling.seed % SEEDS
    c.llama_sampler_chain_add(chain, c.llama_sampler_init_dist(seed))
    return chain
