"""What every route needs: the models, the settings, and who asks."""

import dataclasses

from fastapi import Request

from appliance.recipe import Serve
from appliance.serving.engine import Models


@dataclasses.dataclass(frozen=True, slots=True)
class ApiContext:
    models: Models
    serve: Serve

    def tenant(self, request: Request) -> str:
        """Whose request this is, as the check of keys has noted in `request.state.tenant`; "" without keys."""
        return str(request.scope.get("state", {}).get("tenant", ""))
