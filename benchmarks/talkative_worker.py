"""The engine's process as `appliance serve` starts it, whose llama.cpp also says how large its buffers are, on stderr.

`python -m benchmarks.talkative_worker FD`. The engine itself keeps llama.cpp quiet.
"""

import ctypes
import sys

from llama_cpp import llama_cpp as c

from appliance.serving import worker
from appliance.serving.llama import library

SAID = "buffer size"


@c.llama_log_callback  # type: ignore[untyped-decorator, unused-ignore]
def say(_level: int, text: bytes | None, _: object) -> None:
    if text and SAID.encode() in text:
        sys.stderr.write(text.decode(errors="replace"))
        sys.stderr.flush()


def main() -> None:
    library.start()  # sets its own log function, once
    c.llama_log_set(say, ctypes.c_void_p(0))
    worker.main()


if __name__ == "__main__":
    main()
