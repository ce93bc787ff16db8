"""Runs that are killed, disks that fail, checkpoints that were tampered with: what is there is whole, and goes on.

The kill drills use forks of one warm process (`drill.py`), killed for real: by SIGKILL at a random file event below the
output folder or optimiser step, by SIGKILL from outside at a random time, or by a signal in the middle of writing a
random byte. What the process had written stays, since the system goes on: a power failure, where only what was forced
to the disk survives, is not simulated. Forks share the hash seed of their parent; `test_in_a_process_of_its_own` has
another one.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_fast.train import checkpoints
from llava_fast.train.recipe import Recipe, RecipeError
from llava_fast.train.trainer import run

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
CURVE = ("loss", "grad_norm", "learning_rate", "projector_learning_rate", "eval_loss")
STEPS = 60


@pytest.fixture(scope="module")
def fork() -> Iterator[Callable[..., dict]]:
    """A function that runs a job in a fork and returns its answer, see `drill.py`."""
    script = str(Path(__file__).with_name("drill.py"))
    server = subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=ROOT
    )

    def job(recipe: Recipe, **how) -> dict:
        path = recipe.output_dir.with_suffix(".yaml")
        path.write_text(recipe.to_yaml())
        log = path.with_suffix(".log")
        server.stdin.write(json.dumps({"recipe": str(path), "overrides": [], "log": str(log), **how}) + "\n")
        server.stdin.flush()
        return {**json.loads(server.stdout.readline()), "log": log.read_text()}

    yield job
    server.stdin.close()
    assert server.wait(timeout=30) == 0


def settings(stage: str) -> dict:
    """Everything that has a state: dropout, accumulation, both rates, a mean over two steps, evaluations."""
    values = {
        "stage": stage,
        "max_steps": STEPS,
        "global_batch_size": 4,
        "per_device_batch_size": 2,
        "save_steps": 5,
        "save_total_limit": 2,
        "logging_steps": 2,
        "validation": 0.1,
        "eval_steps": 40,
        "group_by": "modality",
        "cache": True,
    }
    if stage == "lora":
        values |= {"lora": {"r": 4, "dropout": 0.2}, "projector_learning_rate": 5e-4}
    return values


def outcome(folder: Path) -> dict:
    """Everything a finished run has left, to the bit, and its curve."""
    state = json.loads((folder / "trainer_state.json").read_text())
    files = ["model.safetensors", "adapter/adapter_model.safetensors"]
    files += [f"checkpoint-{state['max_steps']}/{name}" for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")]
    found = {name: (folder / name).read_bytes() for name in files if (folder / name).is_file()}
    found["curve"] = [(e["step"], key, e[key]) for e in state["log_history"] for key in CURVE if key in e]
    found["steps"] = state["global_step"]
    return found


def all_whole(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, each with all of its files in full."""
    steps = checkpoints.checkpoints_by_step(folder)
    for path in steps.values():
        checkpoints.read_manifest(path)
    return sorted(steps)


def draw(rng: random.Random, whole: dict, kind: str, left: float) -> dict:
    """A random way and moment to die, for a run that has the share `left` of what `whole` did before it."""
    if kind == "event":
        return {"kill_event": rng.randint(1, int(whole["events"] * left))}
    if kind == "time":
        return {"kill_after": rng.uniform(0, whole["seconds"] * left)}
    return {"kill_bytes": rng.randrange(rng.choice(whole["sizes"]))}


@pytest.mark.slow  # in processes of its own, which `make durations` does not see
@pytest.mark.parametrize(("stage", "n_kills"), [("lora", 20), ("projector", 4)])
def test_killed_at_random_moments(stage, n_kills, fork, recipe_for, tmp_path):
    """Runs of 60 steps, each killed up to three times in three ways, and resumed until it ends."""
    seed = int(os.environ.get("DRILL_SEED") or random.randrange(2**32))
    print(f"DRILL_SEED={seed}")
    rng = random.Random(seed)
    reference = recipe_for(output_dir=tmp_path / "whole", **settings(stage))
    whole = fork(reference)
    assert whole["status"] == 0, whole["log"]
    last = reference.output_dir / f"checkpoint-{STEPS}"
    whole["sizes"] = [path.stat().st_size for path in last.iterdir() if path.stat().st_size > 1000]
    expected = outcome(reference.output_dir)
    assert expected["steps"] == STEPS and len(expected) == (7 if stage == "lora" else 6)
    assert [step for step, key, _ in expected["curve"] if key == "loss"] == list(range(2, STEPS + 1, 2))
    kills = 0
    while kills < n_kills:
        recipe = recipe_for(output_dir=tmp_path / "killed", **settings(stage))
        for kind in rng.sample(["event", "time", "bytes"], 3):
            steps = all_whole(recipe.output_dir)
            recipe.resume = bool(steps)
            how = draw(rng, whole, kind, left=max(1 - max(steps, default=0) / STEPS, 0.1))
            answer = fork(recipe, **how)
            print(f"after {steps}: {how}, status {answer['status']}")
            if answer["status"] != 0:  # it may have been over before
                assert answer["status"] in (-signal.SIGKILL, -signal.SIGXFSZ), answer["log"]
                kills += 1
        recipe.resume = bool(all_whole(recipe.output_dir))
        answer = fork(recipe)
        assert answer["status"] == 0, answer["log"]
        found = outcome(recipe.output_dir)
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == []
        assert all_whole(recipe.output_dir) == [STEPS - 5, STEPS]
        assert not (recipe.output_dir / checkpoints.UNFINISHED).exists()
        shutil.rmtree(recipe.output_dir)


# The disk


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As many as in the processes that are compared to this one: sums depend on it, in the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(ENVIRONMENT["OMP_NUM_THREADS"]))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Recipe:
    """A LoRA run of 6 steps with checkpoints after 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copy(tiny.chat, folder)
    shutil.copytree(tiny.base, folder / "base")
    recipe = Recipe(
        stage="lora",
        model=folder / "base",
        data=folder / "chat.json",
        image_folder=tiny.folder,
        output_dir=folder / "out",
        dtype="fp32",
        global_batch_size=8,
        per_device_batch_size=4,
        max_steps=6,
        learning_rate=1e-3,
        lora={"r": 4, "dropout": 0.2},
        save_steps=2,
        workers=0,
    )
    run(recipe)
    return recipe


@pytest.fixture
def copied(finished, tmp_path) -> Recipe:
    """The same run as it was after 4 steps, in a place where it may be damaged."""
    shutil.copytree(finished.output_dir.parent, tmp_path / "copy")
    paths = {key: tmp_path / "copy" / getattr(finished, key).name for key in ("model", "data", "output_dir")}
    for path in paths["output_dir"].iterdir():
        if path.name not in ("checkpoint-2", "checkpoint-4"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return replace(finished, **paths, resume=True)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"fails_at": 4, "full_bytes": 1_000}, "File too large"),  # in Python
        ({"fails_at": 4, "full_bytes": 20_000}, "File too large"),  # in safetensors
        ({"fails_at": 4, "full_bytes": 60_000}, "unexpected pos"),  # in PyTorch
        ({"fails_at": 4}, "Permission denied"),
        ({"fails_at": 6, "full_bytes": 60_000}, "File too large"),  # the merged model
        ({"fails_at": 6}, "Permission denied"),
    ],
)
def test_a_disk_that_fails_leaves_the_last_checkpoint(how, reason, fork, copied, finished):
    """Real errors of the system: a limit on the size of files, and the rights of nobody."""
    folder = copied.output_dir
    shutil.rmtree(folder)
    copied.resume = False
    answer = fork(copied, **how)
    *_, line = answer["log"].splitlines()
    failed = "checkpoint-4" if how["fails_at"] == 4 else ""
    assert answer["status"] == 1
    assert line.startswith(f"error: {folder / failed}: could not be written: ") and reason in line
    assert "Traceback" not in answer["log"]
    assert all_whole(folder) == ([2] if failed else [2, 4, 6])
    assert not (folder / "config.json").exists()
    if "full_bytes" in how:  # who may not write may not remove either
        assert contents(folder / checkpoints.UNFINISHED) == {}
    folder.chmod(0o755)
    copied.resume = True
    assert fork(copied)["status"] == 0
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (finished.output_dir / name).read_bytes()


def test_in_a_process_of_its_own(copied, finished, tmp_path):
    """The command line, killed by a full disk and resumed in processes that have nothing in common."""
    shutil.rmtree(copied.output_dir)
    copied.resume = False
    path = tmp_path / "recipe.yaml"
    path.write_text(copied.to_yaml())
    command = [sys.executable, "-m", "llava_fast.train", str(path), "logging_steps=2", "workers=2"]
    limited = ["bash", "-c", 'ulimit -f 60; exec "$@"', "-", *command]  # KiB
    done = subprocess.run(limited, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {copied.output_dir / 'checkpoint-2'}: could not be written")
    assert all_whole(copied.output_dir) == []
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    ours, theirs = copied.output_dir / "model.safetensors", finished.output_dir / "model.safetensors"
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_folder_that_cannot_be_written_is_told_at_once(copied, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    before = contents(copied.output_dir)
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(RecipeError, match=r"Permission denied: .*out"):
        run(copied)
    assert contents(copied.output_dir) == before


@pytest.mark.parametrize("n_moves", range(4))
def test_a_model_is_never_half_old_and_half_new(n_moves, tmp_path, monkeypatch):
    """Stopped after each move of a new model over an old one: what has a `config.json` is all new."""
    new = tmp_path / checkpoints.UNFINISHED / "model"
    for folder, age in ((tmp_path, "old"), (new, "new")):
        (folder / "adapter").mkdir(parents=True)
        for name in ("config.json", "model.safetensors", "adapter/adapter_model.safetensors"):
            (folder / name).write_text(age)
    moves = []
    move = os.replace

    def stop(source, target) -> None:
        if len(moves) == n_moves:
            raise OSError("no more")
        moves.append(target)
        move(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(OSError, match="no more"):
        checkpoints.publish_model(new, tmp_path)
    assert not (tmp_path / "config.json").exists()
    monkeypatch.setattr(os, "replace", move)
    checkpoints.publish_model(new, tmp_path)
    assert set(contents(tmp_path).values()) <= {b"new"} and (tmp_path / "config.json").exists()


# What a killed run has left


def test_leftovers_are_removed_and_nothing_else(copied):
    folder = copied.output_dir
    (folder / checkpoints.UNFINISHED / "checkpoint-6").mkdir(parents=True)
    (folder / checkpoints.UNFINISHED / "checkpoint-6" / "model.safetensors").write_bytes(b"half")
    (folder / "checkpoint-6.old").mkdir()
    (folder / "notes.txt").write_text("mine")
    run(copied)
    assert not (folder / checkpoints.UNFINISHED).exists()
    assert (folder / "checkpoint-6.old").is_dir() and (folder / "notes.txt").read_text() == "mine"


def test_ends_where_only_the_model_was_missing(copied, finished):
    """Killed after the last checkpoint, in the middle of an epoch: no step more is taken."""
    shutil.copytree(finished.output_dir / "checkpoint-6", copied.output_dir / "checkpoint-6")
    result = run(copied)
    assert result["steps"] == 6
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (copied.output_dir / name).read_bytes() == (finished.output_dir / name).read_bytes()


@pytest.mark.parametrize("limit", [1, 2, None])
def test_ends_where_the_oldest_checkpoint_had_not_gone_yet(limit, copied, finished):
    """Killed between the last checkpoint's coming and an earlier one's going: no step follows that would remove it."""
    shutil.copytree(finished.output_dir / "checkpoint-6", copied.output_dir / "checkpoint-6")
    run(replace(copied, save_total_limit=limit))
    assert all_whole(copied.output_dir) == [2, 4, 6][-limit if limit else 0 :]
    assert not (copied.output_dir / checkpoints.UNFINISHED).exists()
    assert (copied.output_dir / "model.safetensors").read_bytes() == (
        finished.output_dir / "model.safetensors"
    ).read_bytes()


def test_the_new_checkpoint_is_whole_before_the_old_one_goes(copied, monkeypatch):
    """`save_total_limit: 1`, seen at each move and removal."""
    seen = []
    for module, name in ((os, "replace"), (shutil, "rmtree")):
        real = getattr(module, name)

        def look(*args, real=real, **kwargs):
            seen.append(all_whole(copied.output_dir))
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, look)
    copied.save_total_limit = 1
    run(copied)
    assert [4, 6] not in seen[:2] and [2, 4, 6] in seen and all(seen)
    assert all_whole(copied.output_dir) == [6]


def test_going_back_to_an_earlier_checkpoint(copied, finished):
    """Later ones are replaced when their step comes again, and are the first to go."""
    folder = copied.output_dir
    (folder / "checkpoint-9").mkdir()
    (folder / "checkpoint-4" / "mine.txt").write_text("of the abandoned run")
    run(replace(copied, resume=folder / "checkpoint-2", save_total_limit=2))
    assert sorted(checkpoints.checkpoints_by_step(folder)) == [4, 6]
    assert not (folder / "checkpoint-4" / "mine.txt").exists()
    assert (folder / "model.safetensors").read_bytes() == (finished.output_dir / "model.safetensors").read_bytes()


# Checkpoints that are not what the run was


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def forget(path: Path, outer: str, inner: str) -> None:
    manifest = json.loads(path.read_text())
    del manifest[outer][inner]
    path.write_text(json.dumps(manifest))


def scramble(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: cut(f / "optimizer.pt"), "checkpoint-4/optimizer.pt has"),
        (lambda f: cut(f / "adapter_model.safetensors"), "checkpoint-4/adapter_model.safetensors has"),
        (lambda f: (f / "rng_state.pth").unlink(), "checkpoint-4/rng_state.pth is missing; to go on from another one"),
        (lambda f: (f / "scheduler.pt").unlink(), "checkpoint-4/scheduler.pt is missing"),
        (lambda f: (f / "complete.json").unlink(), "checkpoint-4 is not a complete checkpoint (no complete.json)"),
        (lambda f: cut(f / "complete.json"), "checkpoint-4/complete.json cannot be read"),
        (lambda f: (f / "complete.json").write_text("[]"), "checkpoint-4/complete.json cannot be read"),
        (lambda f: (f / "complete.json").write_text("[" * 10**5), "checkpoint-4/complete.json cannot be read"),
        (lambda f: forget(f / "complete.json", "progress", "sharding"), "checkpoint-4/complete.json cannot be read"),
        (lambda f: scramble(f / "optimizer.pt"), "checkpoint-4 cannot be read"),
        (lambda f: scramble(f / "scheduler.pt"), "checkpoint-4 cannot be read"),
        (lambda f: scramble(f / "rng_state.pth"), "checkpoint-4 cannot be read"),
        (lambda f: scramble(f / "trainer_state.json"), "checkpoint-4 cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_one_line(damage, message, copied):
    folder = copied.output_dir
    damage(folder / "checkpoint-4")
    before = contents(folder)
    with pytest.raises(RecipeError) as error:
        run(copied)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch_size": 4}, "global_batch_size is 4, but"),
        ({"learning_rate": 1e-4}, "learning_rate is 0.0001, but"),
        ({"max_steps": 8}, "max_steps is 8, but"),
        ({"seed": 1}, "seed is 1, but"),
        ({"lora": {"r": 8, "dropout": 0.2}}, "lora.r is 8, but"),
        ({"stage": "full", "lora": None}, "stage is full, but"),
        ({"validation": 0.2}, "validation is 0.2, but"),
        ({"group_by": "length"}, "group_by is length, but"),
    ],
)
def test_another_recipe_is_one_line_that_names_the_key(changes, message, copied):
    before = contents(copied.output_dir)
    with pytest.raises(RecipeError) as error:
        run(replace(copied, **changes))
    assert message in str(error.value) and "checkpoint-4 was made with" in str(error.value)
    assert contents(copied.output_dir) == before


def test_other_data_weights_or_tokens_are_one_line(copied):
    before = contents(copied.output_dir)

    def refused(message: str) -> None:
        with pytest.raises(RecipeError) as error:
            run(copied)
        assert message in str(error.value) and "\n" not in str(error.value)
        assert contents(copied.output_dir) == before

    text = copied.data.read_text()
    copied.data.write_text(text.replace("red", "rot"))
    refused(f"resume: data: {copied.data} is not the data that {copied.output_dir / 'checkpoint-4'} was made with")
    copied.data.write_text(text)
    weights = load_file(copied.model / "model.safetensors")
    name = "multi_modal_projector.linear_1.weight"
    save_file({**weights, name: weights[name] + 1}, copied.model / "model.safetensors", {"format": "pt"})
    refused(f"resume: model: {copied.model} has not the weights")
    save_file(weights, copied.model / "model.safetensors", {"format": "pt"})
    tokenizer = json.loads((copied.model / "tokenizer.json").read_text())
    del tokenizer["model"]["merges"][-50:]
    (copied.model / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused("resume: data: samples are not those")


def test_what_may_change(copied, finished):
    """Files may move, as they have here; logging and saving may change, and how a step is cut, up to rounding."""
    changed = replace(copied, per_device_batch_size=8, save_steps=3, logging_steps=2, gradient_checkpointing=True)
    run(replace(changed, lora=copied.lora))
    ours, theirs = (load_file(recipe.output_dir / "model.safetensors") for recipe in (copied, finished))
    assert ours.keys() == theirs.keys()


class Call:
    """A pickle that would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_pickles_in_a_checkpoint_are_not_run(name, copied, tmp_path):
    path = copied.output_dir / "checkpoint-4" / name
    torch.save({"state": Call(tmp_path / "pwned")}, path)
    manifest = path.with_name(checkpoints.MANIFEST)
    text = json.loads(manifest.read_text())
    text["files"][name] = path.stat().st_size
    manifest.write_text(json.dumps(text))
    with pytest.raises(RecipeError, match="checkpoint-4 cannot be read: UnpicklingError: Weights only load failed"):
        run(copied)
    assert not (tmp_path / "pwned").exists()
