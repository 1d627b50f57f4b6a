"""A worker process without a model: `python -m tests.serving.stand_in_worker FD`. Its prompts say what it does.

The name of the model says how loading goes: "refused", "crash", "SIGILL", "silent", or else well; "once-well" crashes from
the second time on (its model path is a file that counts). A text prompt is "count N" (pieces "1 ", "2 " and so on), "rest"
(accepted, and then nothing), "stuck-step", "stuck-encoding", "nonsense", "SIGKILL" and "SIGKILL-after-text".
"""

import functools
import os
import signal
import sys
import threading
import time
from pathlib import Path

from appliance.errors import EnvironmentIncomplete
from appliance.serving import wire, worker
from appliance.serving.engine_settings import EngineSettings
from appliance.serving.events import (
    Accepted,
    DocumentCounts,
    Event,
    Finished,
    Load,
    ModelInfo,
    Pooled,
    StepStats,
    Text,
    TextPiece,
    Tokens,
)
from appliance.serving.outbox import Outbox
from appliance.serving.requests import (
    DetokenizeRequest,
    GenerationRequest,
    PoolingRequest,
    Request,
    TemplateRequest,
    TextPrompt,
    TokenizeRequest,
)


class StandIn:
    def __init__(self, descriptor: int, settings: EngineSettings, outbox: Outbox) -> None:
        self._descriptor = descriptor
        self._outbox = outbox
        self._settings = settings
        self._running: set[str] = set()
        self._step_started_at: float | None = None
        self._documents: DocumentCounts | None = None
        self.encoding_since: float | None = None
        if settings.name == "refused":
            raise EnvironmentIncomplete("It needs 12 GB, 8 GB are free.")
        if settings.name == "crash" or (settings.name == "once-well" and _times_started(settings) > 1):
            os.abort()
        if settings.name == "SIGILL":
            os.kill(os.getpid(), signal.SIGILL)
        if settings.name == "silent":
            time.sleep(1000)

    @property
    def model(self) -> ModelInfo:
        return ModelInfo(
            name=self._settings.name,
            kind=self._settings.kind,
            sha256=self._settings.sha256,
            template_sha256="",
            quantization="F32",
            architecture="none",
            size_bytes=1,
            context_tokens=self._settings.context_tokens,
            slots=self._settings.slots,
            made_at=0,
        )

    def accept(self, request: Request) -> None:
        say = functools.partial(self._outbox.deliver, request.id)
        if isinstance(request, GenerationRequest):
            self._generate(request)
        elif isinstance(request, PoolingRequest):
            say(Pooled(scores=tuple(float(len(each)) for each in request.inputs), prompt_tokens=1))
        elif isinstance(request, TokenizeRequest):
            data = request.text.encode()
            say(Tokens(tokens=tuple(data), pieces=tuple(bytes([each]) for each in data)))
        elif isinstance(request, DetokenizeRequest):
            say(Text(text=bytes(request.tokens).decode()))
        elif isinstance(request, TemplateRequest):
            say(Text(text=str(request.prompt.messages[0]["content"])))
        self._outbox.flush()

    def _generate(self, request: GenerationRequest) -> None:
        assert isinstance(request.prompt, TextPrompt)
        verb, _, number = request.prompt.text.partition(" ")
        if verb == "stuck-encoding":
            self.encoding_since = time.monotonic()
            return
        if verb == "nonsense":
            os.write(self._descriptor, b"\x05\0\0\0hello")
            return
        self._outbox.deliver(request.id, Accepted(prompt_tokens=3))
        self._running.add(request.id)
        if verb == "stuck-step":
            self._step_started_at = time.monotonic()
        elif verb == "count":
            for each in range(int(number)):
                self._say(request.id, TextPiece(text=f"{each + 1} "))
            self._outbox.record_step(StepStats(seconds=0.1, prompt_tokens=3, generated_tokens=int(number)))
            for index in range(request.n):
                self._end(request.id, index)
        elif verb.startswith("SIGKILL"):
            if verb == "SIGKILL-after-text":
                self._say(request.id, TextPiece(text="so "))
            self._outbox.flush()
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def _say(self, request_id: str, event: Event) -> None:
        self._outbox.deliver(request_id, event)

    def _end(self, request_id: str, index: int) -> None:
        self._running.discard(request_id)
        self._say(request_id, Finished(reason="stop", prompt_tokens=3, generated_tokens=1, index=index))

    def cancel(self, request_id: str) -> None:
        if request_id in self._running:
            self._running.discard(request_id)
            self._say(request_id, Finished(reason="cancelled", prompt_tokens=3, generated_tokens=0))
            self._outbox.flush()

    def keep(self, documents: wire.Documents) -> None:
        """Counts them, so that a test sees what it was told."""
        known = len(documents.documents) if documents.is_read_ahead else 0
        self._documents = DocumentCounts(known=known, refused=documents.refused)

    def load(self) -> Load:
        return Load(
            documents=self._documents,
            state="ready",
            running=len(self._running),
            waiting=0,
            slots=self._settings.slots,
            step_started_at=self._step_started_at,
        )

    def drain(self, grace_seconds: float) -> None:  # noqa: ARG002
        for request_id in list(self._running):
            self.cancel(request_id)

    def close(self) -> None:
        print("closed", file=sys.stderr)


def _times_started(settings: EngineSettings) -> int:
    with Path(settings.model_path).open("a+") as stream:
        stream.write("x")
        stream.flush()
        return stream.tell()


if __name__ == "__main__":
    worker.behave()
    descriptor = int(sys.argv[1])
    sys.exit(worker.run(descriptor, functools.partial(StandIn, descriptor)))
