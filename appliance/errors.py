"""The error tree. Every error that a person can cause or cure is one of these.

    ApplianceError                   exit 1, HTTP 500
    ├── RecipeError                  exit 2, HTTP 400   a recipe, setting or flag is wrong
    ├── DataError                    exit 1, HTTP 400   training data is missing, empty or malformed
    ├── TrainingFailed               exit 1, HTTP 500   training diverged
    ├── ArtifactError                exit 1, HTTP 500   an artifact is missing, incomplete or locked
    │   └── ModelFileError           exit 1, HTTP 500   a model file is corrupt, truncated or unsupported
    ├── StoreError                   exit 1, HTTP 500   the encrypted store or its key is refused, damaged or locked
    ├── ServerError                  exit 1, HTTP 500   the server cannot start or does not answer (port in use, ...)
    ├── EnvironmentIncomplete        exit 3, HTTP 503   a package, compiler, model or disk space is missing
    │   └── NotAvailableYet          exit 3, HTTP 501   the command exists, what it does is not built yet
    ├── VerificationFailed           exit 4, HTTP 500   a gate or verification failed; nothing is promoted
    └── RequestError                 exit 1, HTTP 400   a request to the server is refused
        ├── NotAuthenticated         exit 1, HTTP 401   no key, or none that is known
        ├── NotAllowed               exit 1, HTTP 403   the key may not do this, or the Host is not this server's
        ├── ModelNotFound            exit 1, HTTP 404
        ├── PromptTooLong            exit 1, HTTP 400
        ├── TryAgain                 exit 1, HTTP 503   carries the seconds after which to ask again
        │   ├── QueueFull            exit 1, HTTP 503
        │   ├── RateLimited          exit 1, HTTP 429
        │   ├── EngineRestarting     exit 1, HTTP 503   the engine's process died or is being replaced
        │   ├── NoMemoryForModel     exit 1, HTTP 503   other models are in use and leave no room for this one
        │   ├── DeadlineTooShort     exit 1, HTTP 504   too many are before this request
        │   └── ShuttingDown         exit 1, HTTP 503
        ├── DeadlineExceeded         exit 1, HTTP 504   the time was over before the answer began
        └── EngineFailed             exit 1, HTTP 500

A message says what happened, the value, the limit and the next action. Errors of other libraries are translated by
type, with `raise ... from`, in the one file that imports the library. An unexpected exception keeps its traceback.
"""

from collections.abc import Sequence


class ApplianceError(Exception):
    """Base of all errors that are reported without a traceback."""

    exit_code = 1
    http_status = 500
    api_code = "internal_error"


class RecipeError(ApplianceError):
    exit_code = 2
    http_status = 400
    api_code = "invalid_recipe"


class DataError(ApplianceError):
    http_status = 400
    api_code = "invalid_data"


class TrainingFailed(ApplianceError):
    api_code = "training_failed"


class ArtifactError(ApplianceError):
    api_code = "artifact_error"


class ModelFileError(ArtifactError):
    api_code = "model_file_error"


class StoreError(ApplianceError):
    api_code = "store_error"


class ServerError(ApplianceError):
    api_code = "server_error"


class EnvironmentIncomplete(ApplianceError):
    exit_code = 3
    http_status = 503
    api_code = "environment_incomplete"


class NotAvailableYet(EnvironmentIncomplete):
    http_status = 501
    api_code = "not_available_yet"


class VerificationFailed(ApplianceError):
    exit_code = 4
    api_code = "verification_failed"


class StepFailed(ApplianceError):
    """A step of a pipeline failed with `exit_code`; its own message went to stderr."""

    api_code = "step_failed"

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class RequestError(ApplianceError):
    """A refused request; `param` names the request field at fault, as OpenAI's error bodies do."""

    http_status = 400
    api_code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ModelNotFound(RequestError):
    http_status = 404
    api_code = "model_not_found"


class PromptTooLong(RequestError):
    api_code = "context_length_exceeded"


class NotAuthenticated(RequestError):
    http_status = 401
    api_code = "invalid_api_key"


class NotAllowed(RequestError):
    http_status = 403
    api_code = "not_allowed"


class TryAgain(RequestError):
    """Refused for now; `retry_after_seconds` is the server's estimate of when it will be otherwise."""

    http_status = 503
    api_code = "try_again"

    def __init__(self, message: str, *, retry_after_seconds: int, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.retry_after_seconds = retry_after_seconds


class QueueFull(TryAgain):
    api_code = "queue_full"


class RateLimited(TryAgain):
    http_status = 429
    api_code = "rate_limit_exceeded"


class EngineRestarting(TryAgain):
    api_code = "engine_restarting"


class NoMemoryForModel(TryAgain):
    api_code = "no_memory_for_model"


class ShuttingDown(TryAgain):
    """The server is draining and takes no new request."""

    api_code = "shutting_down"


class DeadlineExceeded(RequestError):
    """The time that the client or the server set for this request is over, or was too short from the outset."""

    http_status = 504
    api_code = "deadline_exceeded"


class DeadlineTooShort(TryAgain):
    """The answer could not begin in time, because others are before it."""

    http_status = 504
    api_code = "deadline_too_short"


class EngineFailed(RequestError):
    http_status = 500
    api_code = "engine_failed"


def several(problems: Sequence[str], heading: str, most: int | None = None) -> str:
    """One message for all problems found, so that a person mends them in one go; `most` of them are listed."""
    if len(problems) == 1:
        return f"{heading}: {problems[0]}"
    listed = list(problems[:most])
    if len(listed) < len(problems):
        listed.append(f"and {len(problems) - len(listed):,} more")
    return f"{heading}, {len(problems):,} problems:\n" + "\n".join(f"  - {problem}" for problem in listed)
