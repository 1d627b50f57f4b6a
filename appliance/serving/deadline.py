"""When the time of a request is over."""

from appliance.recipe import Serve


def deadline_at(serve: Serve, arrived_at: float, asked_seconds: float | None = None) -> float:
    """A client may ask for less than the server's limit, not for more."""
    return arrived_at + min(asked_seconds or serve.deadline_seconds, serve.deadline_seconds)
