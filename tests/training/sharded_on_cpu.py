"""The command line where accelerate takes the CPU for a card over which it may shard a model: it offers FSDP on cards only.

All else is what runs on cards: torch's FSDP2, accelerate's use of it, the trainers, the configuration file; gloo is in the
place of NCCL.
"""

import os
from typing import Any

import torch.distributed
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from appliance.cli import main


def backend_of_a_card(*_: Any, **__: Any) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_XPU


if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = backend_of_a_card  # type: ignore[assignment,method-assign]
    main(prog_name="appliance")
