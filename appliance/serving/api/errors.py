"""Error bodies: OpenAI's shape, and Ollama's `{"error": "..."}` under /api/. They never repeat what a client wrote.

`error_response` is for whoever answers before a route is found; `add_handlers` is for everything after.
Shape: https://platform.openai.com/docs/guides/error-codes.
"""

import itertools
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from appliance.errors import ApplianceError, RequestError, TryAgain
from appliance.serving.api.fields import Strict
from appliance.serving.metrics import Metrics

OLLAMA_PATHS = "/api/"
HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
HTTP_MESSAGES = {404: "This server has no such route.", 405: "This method is not allowed here."}
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
MAX_PROBLEMS = 8  # in one message
MESSAGE_TAGS = ("system", "developer", "user", "assistant", "tool")
FORMAT_FIELDS, FORMAT_TAGS = ("response_format", "format"), ("text", "json_object", "json_schema")
MAX_NAME_CHARACTERS = 64


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """How OpenAI's API says that something went wrong."""

    error: ErrorDetail


class OllamaErrorBody(BaseModel):
    """How Ollama's API says that something went wrong."""

    error: str


REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": said}
    for status, said in (
        (400, "The request is refused; `param` names the field."),
        (401, "No key, or none that is known."),
        (403, "The key may not do this, or the Host is not this server's."),
        (404, "No model of this name."),
        (408, "The body took too long to arrive."),
        (413, "The body is too large."),
        (429, "Too many requests with this key; Retry-After says when to come back."),
        (500, "The engine failed."),
        (503, "No place now; Retry-After says when to come back."),
        (504, "The deadline is over, or cannot be kept; Retry-After says when it could be."),
    )
}
OLLAMA_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {**said, "model": OllamaErrorBody} for status, said in REFUSALS.items()
}


class RefusedBody(HTTPException):
    """A body that cannot be read. FastAPI lets this class through where it reads bodies, and no other."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, message, headers)
        self.code = code


def error_body(message: str, *, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def appliance_error_body(error: ApplianceError) -> dict[str, Any]:
    param = error.param if isinstance(error, RequestError) else None
    return error_body(str(error), status=error.http_status, code=error.api_code, param=param)


def error_headers(error: ApplianceError) -> dict[str, str]:
    if isinstance(error, TryAgain):
        return {"Retry-After": str(error.retry_after_seconds)}
    return {"WWW-Authenticate": "Bearer"} if error.http_status == 401 else {}


def error_response(error: ApplianceError, path: str) -> JSONResponse:
    """The answer to a request for `path` that failed with `error`."""
    return _response(appliance_error_body(error), error.http_status, path, error_headers(error))


def invalid_body(problems: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The error body of a request that pydantic refused. Names fields, never values: they may be somebody's text."""
    first = problems[0]
    param = _field_path(first["loc"])
    if first["type"] == "extra_forbidden":
        param = ".".join(filter(None, (_field_path(first["loc"][:-1]), str(first["loc"][-1])[:MAX_NAME_CHARACTERS])))
        message = f"{param}: this server does not know or not support this field; remove it."
        return error_body(message, status=400, code="unsupported_parameter", param=param)
    if param is None and first["type"] in ("missing", "model_attributes_type"):
        return error_body("The body must be a JSON object.", status=400, code="invalid_request")
    said = list(dict.fromkeys(f"{_field_path(each['loc']) or 'body'}: {_said(each)}" for each in problems))
    rest = f"; and {len(said) - MAX_PROBLEMS} more" if len(said) > MAX_PROBLEMS else ""
    return error_body("; ".join(said[:MAX_PROBLEMS]) + rest, status=400, code="invalid_request", param=param)


def counted_response(metrics: Metrics, error: ApplianceError, path: str) -> JSONResponse:
    """As `error_response`; counts what the request was refused for. A server that failed did not refuse."""
    if isinstance(error, RequestError) and error.http_status != 500:
        metrics.record_refusal(error.api_code)
    return error_response(error, path)


def add_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Everything that a route can raise becomes an error body; refusals are counted."""

    @app.exception_handler(ApplianceError)
    async def appliance_error(request: Request, error: ApplianceError) -> JSONResponse:
        return counted_response(metrics, error, request.url.path)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        metrics.record_refusal(RequestError.api_code)
        return _response(invalid_body(error.errors()), 400, request.url.path, {})

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        status = error.status_code
        code = HTTP_CODES.get(status, "invalid_request")
        if isinstance(error, RefusedBody):
            code = error.code
            metrics.record_refusal(RequestError.api_code)
        body = error_body(HTTP_MESSAGES.get(status, error.detail), status=status, code=code)
        return _response(body, status, request.url.path, error.headers or {})


def unexpected_error_response(path: str) -> JSONResponse:
    message = "The server met an unexpected error; its log has the details."
    return _response(error_body(message, status=500, code="internal_error"), 500, path, {})


def _response(body: dict[str, Any], status: int, path: str, headers: Mapping[str, str]) -> JSONResponse:
    if path.startswith(OLLAMA_PATHS):
        body = {"error": body["error"]["message"]}
    return JSONResponse(body, status, headers=dict(headers))


def _said(problem: Mapping[str, Any]) -> str:
    """pydantic's own words for a wrong tag repeat the tag, or name a function of this program."""
    match problem["type"]:
        case "union_tag_invalid":
            field = "type" if "()" in problem["ctx"]["discriminator"] else problem["ctx"]["discriminator"].strip("'")
            return f"{field} must be one of {problem['ctx']['expected_tags']}"
        case "union_tag_not_found":
            return "must be an object that says what it is"
        case "value_error":
            return str(problem["ctx"]["error"])
    return str(problem["msg"])


def _field_path(location: Sequence[str | int]) -> str | None:
    """`("body", "messages", 0, "content", "str")` as `messages[0].content`: pydantic adds names of union branches."""
    path = ""
    for before, part in itertools.pairwise(location):
        if isinstance(part, int):
            path += f"[{part}]"
        elif part in _field_names() and not _is_tag(before, part):
            path += f".{part}" if path else part
    return path or None


def _is_tag(before: str | int, part: str) -> bool:
    """Whether `part` names a branch of a union here, although it is a field's name elsewhere."""
    return part in (MESSAGE_TAGS if isinstance(before, int) else FORMAT_TAGS if before in FORMAT_FIELDS else ())


@cache
def _field_names() -> frozenset[str]:
    """Of every request body; whatever else stands in a location is a branch of a union or a client's own key."""
    pending, names = [Strict], set[str]()
    while pending:
        model = pending.pop()
        names.update(model.model_fields)
        pending += model.__subclasses__()
    return frozenset(names)
