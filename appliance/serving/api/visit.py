"""One request with the model that it has leased, whatever API it speaks."""

import contextlib
import dataclasses
import time

from fastapi import Request

from appliance.serving import chat_turn
from appliance.serving.api.context import ApiContext
from appliance.serving.api.request_id import engine_id
from appliance.serving.chat_turn import ChatAnswer, ChatTurn
from appliance.serving.engine import EngineLease


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """Everything it holds is given back when `held` closes."""

    context: ApiContext
    held: contextlib.AsyncExitStack
    lease: EngineLease
    id: str
    tenant: str
    arrived_at: float
    load_seconds: float  # until the model was there

    @classmethod
    async def begin(
        cls, context: ApiContext, request: Request, held: contextlib.AsyncExitStack, model: str | None, *, prefix: str
    ) -> "Visit":
        """Leases the model; `prefix` begins the id. Raises what `Models.lease` raises."""
        arrived_at = time.monotonic()
        lease = await held.enter_async_context(context.models.lease(model))
        return cls(
            context=context,
            held=held,
            lease=lease,
            id=engine_id(prefix),
            tenant=context.tenant(request),
            arrived_at=arrived_at,
            load_seconds=time.monotonic() - arrived_at,
        )

    async def start(self, turn: ChatTurn) -> ChatAnswer:
        """Returns once the engine has accepted the turn; raises what `chat_turn.start` raises."""
        answer = await chat_turn.start(
            self.lease,
            turn,
            serve=self.context.serve,
            request_id=self.id,
            arrived_at=self.arrived_at,
            tenant=self.tenant,
        )
        self.held.callback(answer.cancel)
        return answer
