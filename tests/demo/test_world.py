"""The picture world: deterministic, balanced, split by scene, and its answers right."""

import random
import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from llava_fast.demo import world

SCENES = world.scenes(1, 600, held=False)
HELD_OUT = world.scenes(2, 300, held=True)


def test_same_seed_same_world():
    assert world.scenes(1, 50, held=False) == SCENES[:50]
    for scene in SCENES[:5]:
        assert world.ask(scene, random.Random(3), 8) == world.ask(scene, random.Random(3), 8)
        assert world.caption(scene, random.Random(3)) == world.caption(scene, random.Random(3))
        assert np.array_equal(world.render(scene, 4), world.render(scene, 4))
        assert not np.array_equal(world.render(scene, 4), world.render(scene, 5))


def test_held_out_scenes_are_never_training_scenes():
    assert set(SCENES).isdisjoint(HELD_OUT)
    assert not any(map(world.held_out, SCENES))
    assert all(map(world.held_out, HELD_OUT))
    # The split looks at the scene, not at the order in which its objects are named.
    scene = next(scene for scene in HELD_OUT if len(scene) == 3)
    assert world.held_out(scene[::-1])


def test_both_sides_of_the_split_show_every_word():
    for scenes in (SCENES, HELD_OUT):
        assert {o.colour for scene in scenes for o in scene} == set(world.COLOURS)
        assert {o.shape for scene in scenes for o in scene} == set(world.SHAPES)
        assert {o.place for scene in scenes for o in scene} == set(range(len(world.PLACES)))


@pytest.mark.parametrize("scenes", [SCENES, HELD_OUT], ids=["training", "held out"])
def test_most_pictures_have_several_objects(scenes):
    assert sum(len(scene) >= 2 for scene in scenes) / len(scenes) >= 0.5
    for scene in scenes:
        assert len({o.place for o in scene}) == len({(o.colour, o.shape) for o in scene}) == len(scene) <= 3


def test_kinds_are_balanced():
    rng = random.Random(0)
    kinds = Counter(q.kind for scene in SCENES for q in world.ask(scene, rng, 8))
    assert set(kinds) == set(world.KINDS)
    assert kinds["count"] / kinds.total() <= 0.25
    assert min(kinds.values()) >= 0.5 * max(kinds.values())


def test_guessing_without_looking_earns_little():
    """Even the best fixed answer to every wording (with names and places left out) is mostly wrong."""
    rng = random.Random(0)
    names = "|".join([*world.COLOURS, *world.SHAPES, *sorted(world.PLACES, key=len, reverse=True)])
    answers = defaultdict(Counter)
    for scene in SCENES:
        for q in world.one_of_each_kind(scene, rng):
            # "left or right of" is part of a question's wording.
            wording = q.kind + re.sub(rf"\b({names})\b(?! or| of)", "_", q.text)
            answers[wording][q.answer] += 1
    best = sum(max(counts.values()) for counts in answers.values())
    assert best / sum(counts.total() for counts in answers.values()) < 0.42
    exists = answers["existsIs there a _ object?"]
    assert 0.4 < exists["yes"] / exists.total() < 0.6


def derive(scene, text):
    """The answer, found anew from the words of the question and a board of the scene."""
    board = {world.PLACES[o.place]: (o.colour, o.shape) for o in scene}
    spot = {
        name: (list(world.PLACES).index(place) // world.SIDE, list(world.PLACES).index(place) % world.SIDE)
        for place, name in board.items()
    }
    where = {name: place for place, name in board.items()}
    words = text.rstrip("?").split()
    match words:
        case ["What", "is", "at", "the", place]:
            return "a " + " ".join(board[place]) if place in board else "nothing"
        case ["What", "colour", "is", "the", "object", "at", "the", place]:
            return board[place][0]
        case ["What", "shape", "is", "the", "object", "at", "the", place]:
            return board[place][1]
        case ["What", "colour", "is", "the", shape]:
            (colour,) = [c for c, s in where if s == shape]
            return colour
        case ["What", "shape", "is", "the", colour, "object"]:
            (shape,) = [s for c, s in where if c == colour]
            return shape
        case ["Where", "is", "the", colour, shape]:
            return where[colour, shape]
        case ["Is", "there", "a", colour, "object"]:
            return "yes" if any(c == colour for c, _ in where) else "no"
        case ["Is", "the", c0, s0, "left", "or", "right", "of", "the", c1, s1]:
            return "left" if spot[c0, s0][1] < spot[c1, s1][1] else "right"
        case ["Is", "the", c0, s0, "above", "or", "below", "the", c1, s1]:
            return "above" if spot[c0, s0][0] < spot[c1, s1][0] else "below"
        case ["How", "many", "objects", "are", "there"]:
            return ("zero", "one", "two", "three")[len(board)]
        case ["How", "many", colour, "objects", "are", "there"]:
            return ("zero", "one", "two", "three")[[c for c, _ in where].count(colour)]
    raise AssertionError(text)


def test_answers_are_right():
    rng = random.Random(5)
    for scene in [*SCENES, *HELD_OUT]:
        for question in world.ask(scene, rng, 8):
            assert derive(scene, question.text) == question.answer, (scene, question)
            if question.kind == "relation":  # the question must have one answer
                first, second = [o for o in scene if o.name in question.text]
                axis = (lambda p: p % world.SIDE) if "left or right" in question.text else (lambda p: p // world.SIDE)
                assert axis(first.place) != axis(second.place)


def test_captions_tell_the_whole_scene():
    rng = random.Random(6)
    for scene in SCENES:
        text = world.caption(scene, rng)
        by_name = re.findall(r"a (\S+) (\S+) at the ([a-z-]+)[,.]", text)
        by_shape = re.findall(r"a (\S+) coloured (\S+) at the ([a-z-]+)[,.]", text)
        by_place = re.findall(r"at the ([a-z-]+) a (\S+) ([a-z]+)", text)
        if text.startswith("at"):
            told = set(by_place)
        else:
            told = {(p, c, s) for s, c, p in by_shape} or {(p, c, s) for c, s, p in by_name}
        assert told == {(world.PLACES[o.place], o.colour, o.shape) for o in scene}
        for place in re.findall(r"at the ([a-z-]+) nothing", text):
            assert place not in {world.PLACES[o.place] for o in scene}


def test_pictures_show_what_the_scene_says():
    """At the middle of each placed shape is its colour; an empty place is paper."""
    cell = world.PICTURE_PX / world.SIDE
    for seed, scene in enumerate(SCENES[:100]):
        pixels = np.asarray(world.render(scene, seed)).astype(int)
        for o, placed in zip(scene, world.layout(scene, seed), strict=True):
            shown = pixels[round(placed.y), round(placed.x)]
            nearest = min(world.COLOURS, key=lambda c: np.abs(np.array(world.COLOURS[c]) - shown).sum())
            assert nearest == o.colour
            assert placed.x // cell + world.SIDE * (placed.y // cell) == o.place
        for place in world.empty_places(scene):
            middle = pixels[int((place // world.SIDE + 0.5) * cell), int((place % world.SIDE + 0.5) * cell)]
            assert middle.min() > 200
