"""The shipped weights, and the script that makes them."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPVisionModel, LlamaForCausalLM

from llava_fast.demo import pretrain, world
from llava_fast.processor.templates import get_template


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few steps of pretraining, from start to files."""
    out = tmp_path_factory.mktemp("weights")
    pretrain.pretrain_tower(out / "tower", steps=2, batch_size=8)
    pretrain.pretrain_text(out / "text", steps=2, batch_size=2)
    return out


def test_shipped_weights_are_small():
    files = [path for path in pretrain.WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 3 * 10**6
    assert all(
        t.dtype == torch.float16 for path in files if path.suffix == ".safetensors" for t in load_file(path).values()
    )


@pytest.mark.parametrize("shipped", [True, False], ids=["shipped", "fresh"])
def test_weights_load_in_stock_transformers(shipped, trained):
    folder = pretrain.WEIGHTS if shipped else trained
    for part, cls in (("tower", CLIPVisionModel), ("text", LlamaForCausalLM)):
        _, info = cls.from_pretrained(folder / part, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert AutoTokenizer.from_pretrained(folder / "text").vocab_size == pretrain.build_tokenizer().get_vocab_size()


def test_shipped_weights_are_what_the_script_makes(trained):
    """Same shapes, names, settings and tokenizer; the numbers take a longer training."""
    for part in ("tower", "text"):
        fresh, shipped = (load_file(folder / part / "model.safetensors") for folder in (trained, pretrain.WEIGHTS))
        assert {k: v.shape for k, v in fresh.items()} == {k: v.shape for k, v in shipped.items()}
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            if (trained / part / name).exists():
                assert json.loads((trained / part / name).read_text()) == json.loads(
                    (pretrain.WEIGHTS / part / name).read_text()
                )


def test_tokenizer_knows_every_word_and_gives_text_back():
    tokenizer = AutoTokenizer.from_pretrained(pretrain.WEIGHTS / "text")
    rng = random.Random(0)
    template = get_template("v1")
    for scene in world.scenes(3, 300, held=True):
        turns = [text for q in world.ask(scene, rng, 8) for text in (q.text, q.answer)]
        prompt = "".join(text for text, _ in template.pieces(["<image>\n" + turns[0], *turns[1:]]))
        for text in (prompt, world.caption(scene, rng) + "\n"):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == "<s>" + text


def test_pretraining_text_has_training_scenes_only(monkeypatch):
    drawn = []
    sample = world.sample_scene

    def spy(*args, **kwargs):
        drawn.append(sample(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(world, "sample_scene", spy)
    text = pretrain.TextWorld(pretrain.build_tokenizer())
    rng = random.Random(0)
    for _ in range(50):
        text.captioning(rng)
        text.conversation(rng)
    pretrain.tower_batch(rng, 50)
    assert len(drawn) > 150 and not any(map(world.held_out, drawn))


def test_text_samples_are_in_the_template_of_the_demo():
    """Without its description, a sample is word for word what stage 2 has after the picture."""
    tokenizer = pretrain.build_tokenizer()
    text, rng = pretrain.TextWorld(tokenizer), random.Random(1)
    for _ in range(20):
        sample = text.conversation(rng)
        learned = tokenizer.decode([i for i in sample.labels if i >= 0], skip_special_tokens=False)
        *questions, last = learned.removeprefix("\n").split("</s>USER: ")
        turns = [part for turn in (*questions, last.removesuffix("</s>")) for part in turn.split(" ASSISTANT: ")]
        wanted = "".join(piece for piece, _ in get_template("v1").pieces(turns))
        assert wanted.endswith("USER: " + learned.removeprefix("\n"))
        answers = [i for i, is_answer in zip(sample.labels, sample.answers, strict=True) if is_answer]
        assert tokenizer.decode(answers).split() == " ".join(turns[1::2]).split()


def test_conversations_ask_for_every_colour_by_shape(monkeypatch):
    """Once each, with the answer."""
    drawn = []
    sample = world.sample_scene
    monkeypatch.setattr(
        world, "sample_scene", lambda *args, **kwargs: drawn.append(sample(*args, **kwargs)) or drawn[-1]
    )
    tokenizer = pretrain.build_tokenizer()
    text, rng = pretrain.TextWorld(tokenizer), random.Random(1)
    for _ in range(20):
        ids = [i for i in text.conversation(rng).labels if i >= 0]
        learned = tokenizer.decode(ids, skip_special_tokens=False)
        for shape in world.SHAPES:
            colours = [o.colour for o in drawn[-1] if o.shape == shape]
            asked = learned.split(f"What colour is the {shape}? ASSISTANT: ")[1:]
            assert [said.partition("</s>")[0] for said in asked] == (colours if len(colours) == 1 else [])


def test_slots_name_every_object_and_leave_room_for_nothing():
    tokenizer = pretrain.build_tokenizer()
    text, rng = pretrain.TextWorld(tokenizer), random.Random(2)
    for _ in range(50):
        scene = world.sample_scene(rng, held=False, weights=(1, 1, 1))
        slots = {" ".join(tokenizer.id_to_token(i).removeprefix("Ġ") for i in slot) for slot in text._slots(scene, rng)}
        objects = {f"{o.name} {world.PLACES[o.place]}" for o in scene}
        nothing = {"nothing", *(f"nothing {world.PLACES[p]}" for p in world.empty_places(scene))}
        assert objects < slots <= objects | nothing


def test_patches_are_told_what_they_show():
    scene = world.canonical([world.Object(0, "red", "square"), world.Object(3, "blue", "circle")])
    phrases = pretrain.patch_phrases(scene, seed=0).reshape(4, 4)
    told = np.array([*pretrain.PHRASES, "nothing"], dtype=object)[phrases]
    assert told[0, 0] == "a red square at the top-left" and told[3, 3] == "a blue circle at the bottom-right"
    assert told[0, 3] == told[3, 0] == "nothing"


def test_muon_moves_along_the_nearest_orthogonal_matrix():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(6, 4))
    weight.grad = torch.randn(6, 4)
    pretrain.Muon([weight], lr=1.0).step()
    u, _, vh = torch.linalg.svd(weight.grad, full_matrices=False)
    step = -weight.detach() / (6 / 4) ** 0.5
    values = torch.linalg.svdvals(step)
    assert values.min() > 0.6 and values.max() < 1.3  # five iterations bring singular values near to 1
    assert torch.nn.functional.cosine_similarity(step.flatten(), (u @ vh).flatten(), dim=0) > 0.97
