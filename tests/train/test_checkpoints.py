"""Resuming a run that has finished, and making a run longer; `test_interruptions.py` has runs that are killed."""

import shutil

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from llava_fast.train.__main__ import main
from llava_fast.train.checkpoints import AlreadyFinished
from llava_fast.train.recipe import RecipeError
from llava_fast.train.trainer import run
from tests.train.test_trainer import changed, losses


def snapshot(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_has_nothing_left_to_do(recipe_for, tmp_path, capsys):
    settings = {"max_steps": 4, "save_steps": 2}
    run(recipe_for(**settings))
    before = snapshot(tmp_path / "out")
    again = recipe_for(resume=True, **settings)
    with pytest.raises(AlreadyFinished, match=f"{again.output_dir} holds the finished model of this run"):
        run(again)
    (tmp_path / "again.yaml").write_text(again.to_yaml())
    capsys.readouterr()
    assert main([str(tmp_path / "again.yaml")]) == 0  # a job that is submitted again has nothing to complain about
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1 and "to train further, start a new run with model=" in printed.out
    assert snapshot(tmp_path / "out") == before
    constant = {"scheduler": "constant", "output_dir": tmp_path / "constant", **settings}
    run(recipe_for(**constant))
    with pytest.raises(AlreadyFinished):  # `max_steps` is its length, so more epochs are nothing to do
        run(recipe_for(resume=True, epochs=2, **constant))
    # From a checkpoint that is named, the same steps are done again.
    result = run(recipe_for(resume=tmp_path / "out" / "checkpoint-2", **settings))
    assert result["steps"] == 4
    assert load_file(tmp_path / "out" / "model.safetensors").keys()


def test_a_model_of_an_earlier_run_does_not_finish_this_one(recipe_for, tmp_path):
    """An interrupted run in the folder of a finished one, with the same settings, other losses."""
    run(recipe_for(max_steps=4, learning_rate=2e-3))

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe_for(max_steps=4, save_steps=2), [Stop()])
    assert run(recipe_for(max_steps=4, save_steps=2, resume=True))["steps"] == 4


@pytest.mark.parametrize("length", ["max_steps", "epochs"])
def test_a_run_at_a_constant_rate_can_be_made_longer(length, recipe_for, tmp_path):
    """As if it had been planned so: 96 samples are 12 steps."""
    settings = {"scheduler": "constant", "save_steps": 4, "stage": "lora", "lora": {"r": 4, "dropout": 0.2}}
    short, long = ({"max_steps": 6}, {"max_steps": 14}) if length == "max_steps" else ({"epochs": 0.5}, {"epochs": 1.5})
    settings |= {"max_steps": None} if length == "epochs" else {}
    whole = run(recipe_for(output_dir=tmp_path / "whole", **{**settings, **long}))
    run(recipe_for(output_dir=tmp_path / "parts", **{**settings, **short}))
    result = run(recipe_for(output_dir=tmp_path / "parts", resume=True, **{**settings, **long}))
    assert result["steps"] == whole["steps"] > 12
    assert losses(result) == losses(whole)
    assert changed(tmp_path / "whole", tmp_path / "parts") == set()


def test_a_run_whose_rates_depend_on_its_length_cannot(recipe_for, tmp_path):
    run(recipe_for(max_steps=4, save_steps=2))
    with pytest.raises(RecipeError) as error:
        run(recipe_for(max_steps=8, save_steps=2, resume=True))
    assert "max_steps is 8, but" in str(error.value) and "was made with 4" in str(error.value)
    assert f"in a new run, with model={tmp_path / 'out'} and another output_dir" in str(error.value)
    shutil.rmtree(tmp_path / "out")
    run(recipe_for(max_steps=4, save_steps=2, scheduler="constant"))
    with pytest.raises(RecipeError, match="a run can be made longer, by the key that it was made with, not shorter"):
        run(recipe_for(max_steps=2, save_steps=2, scheduler="constant", resume=True))
    with pytest.raises(RecipeError, match=r"resume: stage is lora, but .* was made with full"):
        run(recipe_for(max_steps=4, save_steps=2, scheduler="constant", stage="lora", resume=True))


def test_without_a_checkpoint_the_model_can_be_trained_further(recipe_for, tmp_path):
    run(recipe_for(max_steps=2))
    with pytest.raises(RecipeError, match=r"no checkpoint-N folder in .*, only a finished model; .* set model="):
        run(recipe_for(max_steps=4, resume=True))
    assert run(recipe_for(model=tmp_path / "out", output_dir=tmp_path / "further", max_steps=2))["steps"] == 2
