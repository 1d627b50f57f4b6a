"""The llama.cpp library itself: its start, its log, and what several parts of it need. Loaded once per process."""

import ctypes
import functools
from collections import deque
from typing import Any

from llama_cpp import llama_cpp as c

from appliance import llama_backends
from appliance.errors import EngineFailed

LOG_WARNING, LOG_ERROR = 3, 4  # ggml.h; llama_cpp's own `_logger.py` has them wrong
DECODE_ABORTED = 2
KV_TYPES = {"f16": c.GGML_TYPE_F16, "q8_0": c.GGML_TYPE_Q8_0}

_log_tail: deque[str] = deque(maxlen=4)


@functools.cache
def start() -> None:
    """Once per process: logging into memory, and what computes."""
    c.llama_log_set(_keep_errors, ctypes.c_void_p(0))
    llama_backends.load(c)
    c.llama_backend_init()


def forget_errors() -> None:
    _log_tail.clear()


def first_error() -> str:
    """The first of the errors kept: the cause, where the last one is only what followed from it."""
    return _log_tail[0] if _log_tail else "llama.cpp gives no reason"


def last_error() -> str:
    return _log_tail[-1] if _log_tail else "llama.cpp gives no reason"


def decode(context: Any, batch: Any) -> bool:
    """Computes a `llama_batch`; False when aborted. Raises `EngineFailed`."""
    forget_errors()
    code: int = c.llama_decode(context, batch)
    if code not in (0, DECODE_ABORTED):
        raise EngineFailed(f"llama.cpp could not compute the batch (code {code}: {first_error()}).")
    return code == 0


# The binding's own function makes a pointer and what it points to of each address, to be asked for the address again.
logits_address = ctypes.cast(c.llama_get_logits_ith, ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32))


class AbortFlag:
    """A flag, and a C function that reads it: `strlen` is 0 while the first byte is NUL.

    llama.cpp asks after every node of the graph, hundreds of times a token; a Python callback would have to take the
    interpreter's lock each time.
    """

    def __init__(self) -> None:
        self._flag = ctypes.create_string_buffer(2)
        self._callback = ctypes.cast(ctypes.CDLL(None).strlen, c.ggml_abort_callback)

    def watch(self, context: Any) -> None:
        """Lets the context's computations end early when the flag is raised."""
        c.llama_set_abort_callback(context, self._callback, ctypes.addressof(self._flag))

    def lift(self) -> None:
        self._flag[0] = b"\1"

    def lower(self) -> None:
        self._flag[0] = b"\0"


@c.llama_log_callback  # type: ignore[untyped-decorator, unused-ignore]
def _keep_errors(level: int, text: bytes | None, _: object) -> None:
    if level in (LOG_WARNING, LOG_ERROR) and text:
        _log_tail.append(text.decode(errors="replace").strip())
