"""The simple engine: one model in this process, answered by one scheduler thread."""

import asyncio
from collections.abc import Sequence

from appliance.errors import ModelFileError
from appliance.serving.engine import Generation, GenerationRequest, Load, Message, ModelInfo, StatsListener
from appliance.serving.llama import Context, Model
from appliance.serving.prompt import PromptEncoder
from appliance.serving.scheduler import Scheduler
from appliance.serving.served_model import ServedModel
from appliance.text.chat_template import ChatTemplate, TemplateFailed


class LocalEngine:
    """An `Engine`; making it loads the model. Raises `ModelFileError` or `EnvironmentIncomplete`."""

    def __init__(
        self,
        served: ServedModel,
        *,
        context_tokens: int,
        slots: int,
        threads: int,
        queue_requests: int,
        listener: StatsListener,
    ) -> None:
        model = Model(served.path)
        template = _template(served, model)
        context_tokens = min(context_tokens, model.trained_context_tokens)  # beyond it a model talks nonsense
        context = Context(model, slots=slots, context_tokens=context_tokens, threads=threads)
        stat = served.path.stat()
        self._model = ModelInfo(
            name=served.name,
            sha256=served.sha256,
            quantization=model.quantization,
            architecture=model.metadata("general.architecture") or "unknown",
            size_bytes=stat.st_size,
            context_tokens=context_tokens,
            slots=slots,
            made_at=int(stat.st_mtime),
        )
        self._encoder = PromptEncoder(model, template, context_tokens)
        self._scheduler = Scheduler(context, queue_requests=queue_requests, listener=listener)

    @property
    def model(self) -> ModelInfo:
        return self._model

    async def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return await asyncio.to_thread(self._encoder.encode, messages)

    def submit(self, request: GenerationRequest) -> Generation:
        generation = Generation()
        generation.on_cancel(self._scheduler.submit(request, generation.deliver))
        return generation

    def load(self) -> Load:
        return self._scheduler.load()

    def drain(self, grace_seconds: float) -> None:
        self._scheduler.drain(grace_seconds)

    def close(self) -> None:
        self._scheduler.close()


def _template(served: ServedModel, model: Model) -> ChatTemplate:
    source = model.chat_template
    if source is None:
        raise ModelFileError(f"{served.path} has no chat template: a base model cannot chat. Name a chat model.")
    try:
        return ChatTemplate(source, model.special_tokens)
    except TemplateFailed as error:
        raise ModelFileError(f"{served.path}: {error}") from error
