"""A process that has imported everything and forks for each training run: starting one afresh takes seconds.

It never trains itself, since autograd cannot go on in a fork. Jobs come as lines of JSON on the standard input:
`recipe`, a YAML file; `overrides`; and how to die, if at all: `kill_event`, by SIGKILL at that many file events below
the output folder or optimiser steps; `kill_after`, by SIGKILL after so many seconds; `kill_bytes`, by SIGXFSZ, which
cannot be caught here either, in the middle of the first file that grows beyond that many bytes. Or how the disk
fails, from the end of step `fails_at` on (if that is the last one, when the model is written): files end at
`full_bytes` or, without that, nobody may write.
The answer is a line of JSON with `status` (negative: the signal), `events`, `seconds`.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from functools import partial
from pathlib import Path

from transformers import TrainerCallback

from llava_fast.train import trainer
from llava_fast.train.__main__ import main as command
from llava_fast.train.recipe import load_recipe

NOBODY = 65534
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}


class Moments(TrainerCallback):
    """Counts what happens, kills this process at a given count, and takes the disk away at a given step."""

    def __init__(self, folder: Path, job: dict) -> None:
        self.folder, self.job, self.n = str(folder), job, 0

    def count(self) -> None:
        self.n += 1
        if self.n == self.job.get("kill_event"):
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, arguments: tuple) -> None:
        if event in FILE_EVENTS and str(arguments[0]).startswith(self.folder):
            self.count()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.count()
        if state.global_step == self.job.get("fails_at") != state.max_steps:
            self.fail()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self.job.get("fails_at") == state.max_steps:
            self.fail()

    def fail(self) -> None:
        if "full_bytes" in self.job:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.job["full_bytes"],) * 2)
        else:
            os.chmod(self.folder, 0o500)
            if os.geteuid() == 0:  # who may write anywhere
                os.seteuid(NOBODY)


def train(job: dict, pipe: int, log: int) -> int:
    """What a fork does: the command line's work, with an eye on it."""
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    moments = Moments(load_recipe(job["recipe"], job["overrides"]).output_dir, job)
    trainer.run = partial(trainer.run, callbacks=[moments])
    sys.addaudithook(moments.audit)
    if "kill_bytes" in job:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["kill_bytes"],) * 2)
    status = command([job["recipe"], *job["overrides"]])
    os.write(pipe, str(moments.n).encode())
    sys.stdout.flush()
    return status


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        with open(job["log"], "wb") as log:  # written by a process for which files may be large, and that is not killed
            logger = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log)
        reader, writer = os.pipe()
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            status = 99
            try:
                status = train(job, writer, logger.stdin.fileno())
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(writer)
        logger.stdin.close()
        killer = threading.Timer(job.get("kill_after", 1e6), os.kill, (pid, signal.SIGKILL))
        killer.start()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        killer.cancel()
        killer.join()  # a process forks best alone
        logger.wait()  # all that the fork has said is in the log, and nothing of it comes into the next one's
        events = os.read(reader, 100).decode()
        os.close(reader)
        answer = {"status": status, "events": int(events or 0), "seconds": time.monotonic() - started}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
