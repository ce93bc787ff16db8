"""What two processes do, started by torchrun: one training run after another, as recipes given on the command line say.

accelerate shards on accelerators only, so the CPU is passed off as one here; all else is what a GPU machine runs.
`stop=N` after a recipe ends the run after N steps; `die=N` kills process 1 then.
"""

import os
import signal
import sys

from accelerate import DistributedType, PartialState
from transformers import TrainerCallback

from llava_fast.train import trainer
from llava_fast.train.__main__ import main as command
from llava_fast.train.trainer import run

initialize = PartialState.__init__


def pretend(self, *args, **kwargs) -> None:
    initialize(self, *args, **kwargs)
    if self._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU


class End(TrainerCallback):
    def __init__(self, how: str, step: int) -> None:
        self.how, self.step = how, step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step and self.how == "stop":
            control.should_training_stop = True
        elif state.global_step == self.step and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    PartialState.__init__ = pretend
for line in sys.argv[1:]:
    words = line.split()
    ends = [End(*word.split("=")) for word in words if word.startswith(("stop=", "die="))]
    for end in ends:
        end.step = int(end.step)
    trainer.run = lambda recipe, ends=ends: run(recipe, ends)
    status = command([word for word in words if not word.startswith(("stop=", "die="))])
    if status:
        sys.exit(status)
