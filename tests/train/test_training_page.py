"""docs/training.md and train/accelerate: commands run or are parsed by their programs, keys are known to accelerate."""

import re
import shlex
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.run import get_args_parser

from llava_fast import LlavaForConditionalGeneration
from llava_fast.train.__main__ import main
from llava_fast.train.checkpoints import FREE
from llava_fast.train.recipe import Recipe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
CONFIGS = sorted((ROOT / "train" / "accelerate").glob("*.yaml"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


COMMANDS = [shlex.split(line) for block in blocks("sh") for line in block.splitlines()]


def test_training_and_resuming_run(tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "model").symlink_to(tiny.base)
    shutil.copy(tiny.chat, tmp_path)
    for picture in tiny.folder.glob("*.png"):
        shutil.copy(picture, tmp_path)
    (recipe,) = blocks("yaml")
    (tmp_path / "recipe.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    commands = [words for words in COMMANDS if words[0] == "python"]
    assert len(commands) == 4
    for words in commands:
        assert words[:3] == ["python", "-m", "llava_fast.train"]
        assert main(words[3:]) == 0
        said = {"--print-config": "stage: lora", "resume=true": "nothing is left to do"}.get(words[-1], "4 steps")
        assert said in capsys.readouterr().out
    assert LlavaForConditionalGeneration.from_pretrained("tuned").config.text_config.hidden_size == 48


def test_launchers_take_the_commands():
    launched = [words for words in COMMANDS if words[0] != "python"]
    (torchrun,) = [words for words in launched if words[0] == "torchrun"]
    parsed = get_args_parser().parse_args(torchrun[1:])
    assert (parsed.nproc_per_node, parsed.module) == ("8", True)
    assert [parsed.training_script, *parsed.training_script_args] == ["llava_fast.train", "recipe.yaml"]
    by_accelerate = [words for words in launched if words[0] == "accelerate"]
    assert sorted(words[3] for words in by_accelerate) == [f"train/accelerate/{path.name}" for path in CONFIGS]
    for words in by_accelerate:
        assert words[1] == "launch"
        assert launch_command_parser().parse_args(words[2:]).training_script == "llava_fast.train"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_are_accelerates(path, monkeypatch):
    """Read by accelerate's own class and launcher; keys that it would silently ignore are errors here."""
    command = f"accelerate launch --config_file train/accelerate/{path.name} -m llava_fast.train RECIPE"
    assert path.read_text().splitlines()[1] == f"#   {command}"
    config = load_config_from_file(str(path))
    arguments = launch_command_parser().parse_args(["--config_file", str(path), *command.split()[4:]])
    known = vars(arguments).keys()
    assert (config.fsdp_config or {}).keys() | (config.deepspeed_config or {}).keys() <= known
    assert config.mixed_precision == "no"  # the recipe decides
    arguments, *_ = _validate_launch_command(arguments)
    assert arguments.num_processes == (1 if path.stem == "one-gpu" else 8) and arguments.module
    kind = path.stem.partition("-")[0]
    assert arguments.multi_gpu == (kind == "ddp")
    assert arguments.use_fsdp == (kind == "fsdp2") and arguments.use_deepspeed == kind.startswith("zero")
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)
        environment = prepare_deepspeed_cmd_env(arguments)[1]
    else:
        environment = prepare_multi_gpu_env(arguments)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    if arguments.use_deepspeed:
        made = DeepSpeedPlugin().deepspeed_config
        assert made["zero_optimization"]["stage"] == int(kind[-1])
        # What the recipe decides is left open; a checkpoint of ZeRO-3 is a model, too.
        for key in ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping"):
            assert made[key] == "auto"
        assert made["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] == (kind == "zero3")
    if arguments.use_fsdp:
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward
        assert plugin.state_dict_type.name == "FULL_STATE_DICT"
        assert plugin.transformer_cls_names_to_wrap == ["DecoderLayer", "VisionTower"]


def test_keys_that_may_change_are_named():
    assert {field.name for field in fields(Recipe)} >= FREE
    listed = PAGE[PAGE.index("These may change:") : PAGE.index("For anything else")]
    places = {"output_dir", "data", "validation", "model", "vision_tower", "language_model", "processor"}
    assert set(re.findall(r"`(\w+)`", listed)) == FREE - places - {"image_folder", "resume"}
