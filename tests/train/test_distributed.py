"""Two processes on the CPU (gloo), DDP and FSDP2: the same numbers as one process, whole checkpoints, and no hang."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from llava_fast import LlavaForConditionalGeneration
from llava_fast.train import checkpoints
from llava_fast.train.recipe import Recipe, RecipeError
from llava_fast.train.trainer import GroupedSampler, load_data, load_processor, run

ROOT = Path(__file__).parents[2]
PROCESSES = Path(__file__).with_name("processes.py")
FSDP2 = """
import sys
import torch
import torch.distributed as dist
import yaml
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from llava_fast import LlavaForConditionalGeneration, LlavaProcessor
from llava_fast.train.data import LlavaDataset
from llava_fast.train.sampler import PackedCollator

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


def start(*arguments: str, timeout_s: float = 150, **environment: str) -> subprocess.CompletedProcess:
    """Two processes by torchrun; what still runs after `timeout_s` is killed, and an error."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=ROOT, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def launch(*arguments: str, **environment: str) -> str:
    done = start(*arguments, **environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def shipped(name: str) -> dict[str, str]:
    """The environment that `accelerate launch` makes of a file in train/accelerate."""
    parser = launch_command_parser()
    arguments = ["--config_file", str(ROOT / "train" / "accelerate" / name), "-m", "llava_fast.train", "recipe.yaml"]
    arguments, *_ = _validate_launch_command(parser.parse_args(arguments))
    made = prepare_multi_gpu_env(arguments)
    return {key: value for key, value in made.items() if os.environ.get(key) != value}


@pytest.fixture(scope="module")
def recipes(tiny, tmp_path_factory) -> SimpleNamespace:
    """Recipes over 77 samples, so that the tenth step has 5, and the runs of one process."""
    folder = tmp_path_factory.mktemp("distributed")

    def make(stage: str, output: str, **changes) -> Recipe:
        values = {
            "stage": stage,
            "model": tiny.base,
            "data": tiny.chat,
            "output_dir": folder / output,
            "dtype": "fp32",
            "global_batch_size": 8,
            "per_device_batch_size": 2,
            "max_steps": 12,
            "save_steps": 7,
            "learning_rate": 1e-3,
            "validation": 0.2,
            "group_by": "length" if stage == "lora" else "none",
            "workers": 0,
        }
        if stage == "lora":
            values["lora"] = {"r": 4, "dropout": 0.0}
        return Recipe(**{**values, **changes})

    def write(recipe: Recipe) -> str:
        path = recipe.output_dir.with_suffix(".yaml")
        path.write_text(recipe.to_yaml())
        return str(path)

    single = {stage: run(make(stage, f"one-{stage}"))["log_history"] for stage in ("full", "lora")}
    return SimpleNamespace(make=make, write=write, single=single, folder=folder)


def curve(history: list[dict], key: str) -> list[float]:
    return [entry[key] for entry in history if key in entry]


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_some_batches_of_one_process_are_text_beside_pictures(recipes):
    """What the next tests run over: process 0 has text alone where process 1 has pictures, and the reverse."""
    recipe = recipes.make("full", "unused")
    train, _ = load_data(recipe, load_processor(recipe))
    kinds = [train.modality[i] for i in GroupedSampler(train, "none", 2, 8, recipe.seed)]
    pairs = [[set(kinds[i : i + 2]), set(kinds[i + 2 : i + 4])] for i in range(0, 72, 4)]
    assert len(kinds) == 77
    assert sum(({"text"} in pair) and ("image" in pair[0] | pair[1]) for pair in pairs) >= 2


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_two_processes_train_as_one_does(sharding, recipes):
    """All of it in one launch: LoRA and full training, a stop after a checkpoint and a resume, an uneven last step."""
    environment = shipped(f"{sharding}-8gpu.yaml")
    names = {stage: f"{sharding}-{stage}" for stage in ("full", "lora")}
    whole = {stage: recipes.make(stage, name) for stage, name in names.items()}
    parts = {stage: recipes.make(stage, f"{name}-parts") for stage, name in names.items()}
    lines = [recipes.write(whole[stage]) for stage in names]
    lines += [f"{recipes.write(parts[stage])} stop=7" for stage in names]
    lines += [f"{recipes.write(parts[stage])} resume=true" for stage in names]
    launch(str(PROCESSES), *lines, **environment)
    for stage in names:
        folder, resumed = whole[stage].output_dir, parts[stage].output_dir
        for key, count in (("loss", 12), ("eval_loss", 1)):
            ours, theirs = curve(history(folder), key), curve(recipes.single[stage], key)
            assert len(ours) == count
            assert ours == pytest.approx(theirs, rel=1e-6), (stage, key)
        assert curve(history(folder), "grad_norm") == pytest.approx(curve(recipes.single[stage], "grad_norm"), rel=1e-5)
        assert curve(history(resumed), "loss") == curve(history(folder), "loss")
        assert (resumed / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
        for step, path in checkpoints.checkpoints_by_step(folder).items():
            assert step in (7, 12)
            checkpoints.read_manifest(path)
            model = LlavaForConditionalGeneration.from_pretrained(path).state_dict()
            other = recipes.folder / f"one-{stage}" / path.name
            for name, tensor in LlavaForConditionalGeneration.from_pretrained(other).state_dict().items():
                torch.testing.assert_close(model[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    changed = recipes.make("full", names["full"], resume=parts["full"].output_dir / "checkpoint-7")
    if sharding == "fsdp2":
        with pytest.raises(RecipeError, match="resume: sharding is none, the checkpoint's was FSDP"):
            run(changed)
    else:
        run(changed)
        assert curve(history(changed.output_dir), "loss") == pytest.approx(
            curve(recipes.single["full"], "loss"), rel=1e-6
        )


def test_when_one_process_dies_the_other_ends(recipes):
    path = recipes.write(recipes.make("full", "dies"))
    started = time.monotonic()
    done = start(str(PROCESSES), f"{path} die=8", timeout_s=90)
    assert done.returncode != 0 and time.monotonic() - started < 90
    assert "rank      : 1" in done.stderr and "SIGKILL" in done.stderr
    folder = recipes.folder / "dies"
    assert list(checkpoints.checkpoints_by_step(folder)) == [7]
    checkpoints.read_manifest(folder / "checkpoint-7")


def test_fsdp2_gives_the_same_gradients(tiny, tmp_path):
    """The shipped config's units, one process with pictures and one without."""
    config = yaml.safe_load((ROOT / "train" / "accelerate" / "fsdp2-8gpu.yaml").read_text())["fsdp_config"]
    script = tmp_path / "fsdp2.py"
    script.write_text(FSDP2)
    wrap = config["fsdp_transformer_layer_cls_to_wrap"]
    assert launch(str(script), str(tiny.base), str(tiny.chat), wrap).count("same gradients") == 2
