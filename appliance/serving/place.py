"""One model of a server, loaded or not: what may be asked for, who uses it, and what it holds. Loads nothing itself."""

import asyncio
import dataclasses
from collections.abc import Iterator

import msgspec

from appliance.recipe import Serve
from appliance.serving.engine import ModelCard
from appliance.serving.memory_prediction import MemoryPrediction
from appliance.serving.served_model import ServedModel
from appliance.serving.supervisor import Supervisor


@dataclasses.dataclass(slots=True, eq=False)
class Place:
    """A model that can be asked for, loaded or not."""

    model: ServedModel
    serve: Serve
    engine: Supervisor | None = None
    memory: MemoryPrediction | None = None
    leases: int = 0
    used_at: float = 0.0
    is_leaving: bool = False  # takes no new lease
    is_probed: bool = False
    loading: "asyncio.Task[None] | None" = None

    def cards(self) -> Iterator[ModelCard]:
        """Of the model and of its adapters."""
        model, engine = self.model, self.engine
        context = engine.model.context_tokens if engine else min(self.serve.context_tokens, model.header.context_length)
        base = ModelCard(
            id=model.name,
            kind=model.kind,
            made_at=model.made_at,
            size_bytes=model.header.size_bytes,
            sha256=model.sha256,
            is_loaded=engine is not None,
            quantization=model.header.quantization,
            architecture=model.header.architecture,
            context_tokens=context,
        )
        yield base
        for name, path in model.adapters.items():
            digest = engine.model.adapters.get(name, "") if engine else ""
            size = path.stat().st_size if path.exists() else 0
            yield msgspec.structs.replace(base, id=self.full_name(name), parent=model.name, size_bytes=size, sha256=digest)

    def full_name(self, adapter: str | None) -> str:
        """`model`, or `model:adapter`."""
        return self.model.name if adapter is None else f"{self.model.name}:{adapter}"
