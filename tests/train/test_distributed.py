"""Two processes on the CPU (gloo), with batches of pictures beside batches of text: no hang, and the same numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llava_fast.train.trainer import run

ROOT = Path(__file__).parents[2]
FSDP2 = """
import sys
import torch
import torch.distributed as dist
import yaml
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from llava_fast import LlavaForConditionalGeneration, LlavaProcessor
from llava_fast.train.data import LlavaDataset, PackedCollator

base, data, wrap = sys.argv[1:]
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))


def make():
    model = LlavaForConditionalGeneration.from_pretrained(base)
    model.model.vision_tower.requires_grad_(False)
    return model.train()


plain, sharded = make(), make()
n_units = 0
for module in list(sharded.modules()):
    if type(module).__name__ in wrap.split(","):
        fully_shard(module, mesh=mesh)
        n_units += 1
fully_shard(sharded, mesh=mesh)
assert n_units == 3  # two decoder layers and the tower
processor = LlavaProcessor.from_pretrained(base)
dataset = LlavaDataset(data, data.rpartition("/")[0], processor)
kind = ["image", "text"][dist.get_rank()]
rows = [i for i in range(len(dataset)) if dataset.modality[i] == kind][:3]
batch = PackedCollator(processor)([dataset[i] for i in rows])
for model in (plain, sharded):
    model(**batch, use_cache=False).loss.backward()
for (name, ours), theirs in zip(sharded.named_parameters(), plain.parameters(), strict=True):
    if theirs.requires_grad:
        dist.all_reduce(theirs.grad)
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad / 2, msg=name)
print("same gradients", flush=True)
"""


def launch(*arguments: str) -> str:
    """Output of two processes; a hang is an error after two minutes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_ddp_trains_as_one_process_does(tiny, recipe_for, tmp_path):
    settings = {"group_by": "modality", "validation": 0.2, "per_device_batch_size": 2, "max_steps": 9}
    single = run(recipe_for(output_dir=tmp_path / "one", **settings))["log_history"]
    path = tmp_path / "two.yaml"
    path.write_text(recipe_for(output_dir=tmp_path / "two", **settings).to_yaml())
    launch("-m", "llava_fast.train", str(path))
    double = json.loads((tmp_path / "two" / "trainer_state.json").read_text())["log_history"]
    for key, count in (("loss", 9), ("grad_norm", 9), ("eval_loss", 1)):
        one, two = ([entry[key] for entry in history if key in entry] for history in (single, double))
        assert len(one) == count
        assert two == pytest.approx(one, rel=1e-5), key


def test_fsdp2_gives_the_same_gradients(tiny, tmp_path):
    """The shipped config's units, one process with pictures and one without."""
    config = yaml.safe_load((ROOT / "train" / "accelerate" / "fsdp2-8gpu.yaml").read_text())["fsdp_config"]
    script = tmp_path / "fsdp2.py"
    script.write_text(FSDP2)
    wrap = config["fsdp_transformer_layer_cls_to_wrap"]
    assert launch(str(script), str(tiny.base), str(tiny.chat), wrap).count("same gradients") == 2
