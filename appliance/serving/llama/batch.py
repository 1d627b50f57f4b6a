"""A `llama_batch` over numpy arrays, so that tokens are written by the run and not one by one."""

import ctypes
from collections.abc import Sequence

import numpy as np
from llama_cpp import llama_cpp as c


class Batch:
    """Room for `capacity` tokens, each of one sequence."""

    def __init__(self, capacity: int) -> None:
        self._tokens = np.zeros(capacity, dtype=np.int32)
        self._positions = np.zeros(capacity, dtype=np.int32)
        self._sequences = np.zeros(capacity, dtype=np.int32)
        self._sequence_counts = np.ones(capacity, dtype=np.int32)
        self._sequence_pointers = self._sequences.ctypes.data + 4 * np.arange(capacity, dtype=np.uint64)
        self._is_output = np.zeros(capacity, dtype=np.int8)
        self.native = c.llama_batch(
            n_tokens=0,
            token=self._tokens.ctypes.data_as(ctypes.POINTER(c.llama_token)),
            embd=None,
            pos=self._positions.ctypes.data_as(ctypes.POINTER(c.llama_pos)),
            n_seq_id=self._sequence_counts.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            seq_id=self._sequence_pointers.ctypes.data_as(ctypes.POINTER(ctypes.POINTER(c.llama_seq_id))),
            logits=self._is_output.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    @property
    def capacity(self) -> int:
        return len(self._tokens)

    @property
    def size(self) -> int:
        return int(self.native.n_tokens)

    def clear(self) -> None:
        self.native.n_tokens = 0

    def add(self, tokens: Sequence[int], position: int, sequence: int, outputs: int) -> int:
        """Appends tokens; an output is wanted for the last `outputs` of them. Returns the row of the first of these."""
        start, end = self.size, self.size + len(tokens)
        if len(tokens) == 1:  # an answer's next one: a slice of one costs ten times as much
            self._tokens[start], self._positions[start], self._sequences[start] = tokens[0], position, sequence
            self._is_output[start] = outputs
            self.native.n_tokens = end
            return end - outputs
        self._tokens[start:end] = tokens
        self._positions[start:end] = np.arange(position, position + len(tokens))
        self._sequences[start:end] = sequence
        self._is_output[start : end - outputs] = 0
        self._is_output[end - outputs : end] = 1
        self.native.n_tokens = end
        return end - outputs
