"""Kernels compiled here are what a GPU would look for: the same launches, under the same keys."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import measure, prime
from llava_fast.ops import norm
from llava_fast.ops._launch import recorded

ROOT = Path(__file__).resolve().parents[2]
# The compiler is off where Triton interprets.
ENV = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}


def run(code: str, cache: Path, **env: str) -> str:
    command = [sys.executable, "-c", code]
    env = {**ENV, "TRITON_CACHE_DIR": str(cache), **env}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_is_computed_and_shapes_are_right():
    with prime.NoMemory():
        x = torch.randn(2**16, 2**16)  # 16 GiB, never touched
        product = (x @ x.T).to(torch.bfloat16).exp_()[:, :3]
        index = torch.arange(5) * 2
    assert product.shape == (2**16, 3) and product.dtype == torch.bfloat16 and product.stride() == (2**16, 1)
    assert index.tolist() == [0, 2, 4, 6, 8]


def test_integers_that_compile_to_the_same_code_are_one():
    x = torch.ones(8, 64)
    with recorded(dry=True) as launches:
        for rows in (3, 5, 8, 1):
            norm.norm_forward(x[:rows], x[0], None, None, 1e-5)
    kernels = [prime.described(launch) for launch in launches]
    assert json.loads(json.dumps(kernels)) == kernels  # they travel as JSON
    assert len(prime.distinct(kernels)) < 4
    arguments = [prime._argument(n) for n in (0, 1, 7, 16, 48, 2**31, 2**31 + 1, True, None, 0.1)]
    assert arguments == [16, 1, 17, 16, 16, 2**40 + 16, 2**40 + 17, True, None, 0.5]
    assert prime._argument(torch.ones(8)[1:]) == {"dtype": "float32", "aligned": False}


LISTED = """
from benchmarks import measure, prime
for name in measure.subjects():
    prime.gpu_cases(name)
found = list(prime.launched("sm_90"))
for name, kernels in found:
    if isinstance(kernels, Exception):
        print(name, type(kernels).__name__, kernels)
print(len(found), sum(len(kernels) for _, kernels in found), len(prime.distinct(k for _, ks in found for k in ks)))
"""


def test_every_case_for_a_gpu_runs_dry(tmp_path: Path):
    """At full size, so that no case fails on the card for a reason that needs no card."""
    *failed, counts = run(LISTED.replace("prime.gpu_cases", "measure.gpu_cases"), tmp_path).splitlines()
    assert failed == []
    cases, launches, kernels = map(int, counts.split())
    assert cases > 100 and launches > 1000 and 50 < kernels < 150


# As on a GPU: the launch itself, with its tensors; only loading and running the binary is left out.
AS_ON_A_GPU = """
import json, sys
from unittest import mock
import torch
import triton
from benchmarks import prime
from llava_fast.ops import norm
from llava_fast.ops._launch import recorded
from triton.compiler.compiler import CompiledKernel
from triton.runtime.driver import driver
driver.set_active(prime.Card("sm_90"))
triton.knobs.compilation.listener = lambda **found: print(found["src"].fn.__name__, found["cache_hit"])
with mock.patch.object(CompiledKernel, "_init_handles", lambda self: setattr(self, "_run", lambda *a: None)):
    CompiledKernel.function = None
    x = torch.zeros(640, 4096, dtype=torch.bfloat16)
    with recorded(architecture="sm_90"):
        norm.norm_forward(x, x[0], None, x, 1e-5)
"""


def test_carried_binaries_are_what_a_launch_looks_for(tmp_path: Path):
    """In another cache, as on another machine; not if the kernel's source differs."""
    out, there = tmp_path / "carried", tmp_path / "there"

    def primed(cache: Path, *options: str) -> str:
        return run(f"from benchmarks import prime; prime.main(['--subject', 'norm', *{options!r}])", cache)

    assert "0 of them carried" in primed(tmp_path / "here", "--out", str(out))
    index = json.loads((out / "kernels.json").read_text())
    count = len(index["kernels"])
    assert count > 0 and all((out / entry["folder"]).is_dir() for entry in index["kernels"])

    assert f"{count} ready, {count} of them carried" in primed(there, "--carried", str(out))
    assert run(AS_ON_A_GPU, there) == "_norm_fwd_kernel True\n"
    assert run(AS_ON_A_GPU, tmp_path / "empty") == "_norm_fwd_kernel False\n"

    for entry in index["kernels"]:
        entry["source"] = "another"
    (out / "kernels.json").write_text(json.dumps(index))
    assert f"{count} ready, 0 of them carried" in primed(tmp_path / "here", "--carried", str(out))


def test_workers_end_at_once():
    import time

    start = time.monotonic()
    assert list(prime.in_parallel(time.sleep, [(60,), (60,)], seconds=1.0)) == []
    assert time.monotonic() - start < 20


WORKERS = """
import os, signal, time
from benchmarks import prime
if __name__ == "__main__":
    workers = prime.Workers(1)
    workers.submit(time.sleep, 0).result()
    workers.submit(time.sleep, 60)
    print(*workers.pool._processes, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_die_with_the_process(tmp_path: Path):
    """Even if it is killed; a worker that waits for work would wait for ever."""
    import time

    (tmp_path / "workers.py").write_text(WORKERS)
    command = [sys.executable, str(tmp_path / "workers.py")]
    started = subprocess.run(command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 10
    status = Path(f"/proc/{int(started.stdout)}/stat")
    while status.exists() and status.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_subjects_are_the_benchmarks():
    assert {*measure.subjects()} == {p.stem.removeprefix("test_") for p in (ROOT / "benchmarks").glob("test_*.py")}
