"""A process that measures: `python -m appliance.serving.speed_worker FD`, where FD is its end of a `Meter`'s socket pair.

It is locked in as an engine's process is, loads the model, and times the decoder that answers requests: sampling is part of
what it measures; queues, texts and HTTP are not.
"""

import os
import random
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from appliance.errors import ApplianceError, EngineFailed
from appliance.serving import wire, worker
from appliance.serving.decoder import Feed, Sampled
from appliance.serving.engine_settings import EngineSettings
from appliance.serving.requests import SamplingSettings
from appliance.serving.speed_meter import TASK, Opened, ReadPrompt, Task, Took, WriteAnswers

GREEDY = SamplingSettings()
SEED = 1  # prompts are noise, and the same noise in every process


def main() -> None:
    worker.behave()
    os._exit(run(int(sys.argv[1])))


def run(descriptor: int) -> int:
    """Does tasks until the socket closes; returns the exit code."""
    with socket.socket(fileno=descriptor) as sock:
        settings = wire.receive(sock, wire.SETTINGS)
        if settings is None:
            return 0
        try:
            worker.confine(settings)
            stopwatch = Stopwatch(settings)
            sock.sendall(wire.pack(stopwatch.opened))
            while (task := wire.receive(sock, TASK)) is not None:
                sock.sendall(wire.pack(Took(seconds=stopwatch.seconds(task))))
        except ApplianceError as error:
            sock.sendall(wire.pack(wire.LoadRefused(code=error.api_code, message=str(error))))
            return error.exit_code
    return 0


class Stopwatch:
    """A loaded model and what it takes to do tasks. Prompts of answers stay in memory until one is read for its own sake."""

    def __init__(self, settings: EngineSettings) -> None:
        from appliance.serving.llama import Context, Model

        self._model = Model(
            Path(settings.model_path),
            is_mapped=settings.is_mapped,
            is_repacked=settings.is_repacked,
            gpu_layers=settings.gpu_layers,
        )
        self._context = Context(self._model, settings)
        self._random = random.Random(SEED)
        self._held_tokens: dict[int, int] = {}  # by slot, the length of the prompt in memory

    @property
    def opened(self) -> Opened:
        return Opened(weight_bytes=self._model.weight_bytes, cell_bytes=self._context.cell_bytes)

    def seconds(self, task: Task) -> float:
        return self._read(task) if isinstance(task, ReadPrompt) else self._write(task)

    def _read(self, task: ReadPrompt) -> float:
        for slot in list(self._held_tokens):
            self._release(slot)
        self._context.use_threads(task.threads, task.threads)
        self._context.start(0, GREEDY, None, None)
        tokens = self._noise(task.tokens)
        started = time.perf_counter()
        for position in range(0, task.tokens, task.chunk_tokens):
            chunk = tokens[position : position + task.chunk_tokens]
            self._decode([Feed(0, chunk, position, is_sampled=position + len(chunk) == task.tokens)])
        seconds = time.perf_counter() - started
        self._context.release(0)
        return seconds

    def _write(self, task: WriteAnswers) -> float:
        for slot in range(task.answers):
            self._hold_prompt(slot, task)
        self._context.use_threads(task.threads, task.threads)
        last = dict.fromkeys(range(task.answers), self._noise(1)[0])
        started = time.perf_counter()
        for step in range(task.steps):
            feeds = [Feed(slot, (token,), task.prompt_tokens + step, is_sampled=True) for slot, token in last.items()]
            last = {slot: sampled[0].token for slot, sampled in self._decode(feeds).items()}
        seconds = time.perf_counter() - started
        for slot in range(task.answers):
            if self._context.can_share and task.prompt_tokens:
                self._context.remove(slot, task.prompt_tokens, -1)
            else:
                self._release(slot)
        return seconds

    def _hold_prompt(self, slot: int, task: WriteAnswers) -> None:
        """Reads a prompt of the length that is wanted, unless one is there."""
        if self._held_tokens.get(slot) == task.prompt_tokens:
            return
        self._release(slot)
        self._context.start(slot, GREEDY, None, None)
        self._held_tokens[slot] = task.prompt_tokens
        tokens = self._noise(task.prompt_tokens)
        chunk_tokens = self._context.batch_tokens
        for position in range(0, len(tokens), chunk_tokens):
            self._decode([Feed(slot, tokens[position : position + chunk_tokens], position, is_sampled=False)])

    def _decode(self, feeds: list[Feed]) -> Mapping[int, list[Sampled]]:
        sampled = self._context.decode(feeds, None)
        if sampled is None:
            raise EngineFailed("A measurement was aborted.")
        return {slot: list(each) for slot, each in sampled.items()}

    def _release(self, slot: int) -> None:
        self._held_tokens.pop(slot, None)
        self._context.release(slot)

    def _noise(self, count: int) -> list[int]:
        return [self._random.randrange(self._model.token_count) for _ in range(count)]


if __name__ == "__main__":
    main()
