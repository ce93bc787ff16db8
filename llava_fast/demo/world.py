"""The picture world: coloured shapes on a 2x2 board, their captions, and questions about them.

A *scene* is up to three objects (place, colour, shape), with different colours and different places. From it follow
the picture (`render`), its caption (`caption`), and questions with answers (`ask`). `held_out(scene)` splits all
scenes, by a hash of the scene, into those for training and pretraining and those for evaluation only.
"""

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 70),
    "blue": (40, 90, 215),
    "yellow": (240, 205, 40),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIDE = 2  # the board has SIDE rows and columns
# Place i is row i // SIDE, column i % SIDE. One word each, so that a place is one token.
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")
NUMBERS = ("zero", "one", "two", "three")
KINDS = ("what", "colour", "shape", "where", "exists", "relation", "count")

PICTURE_PX = 128
HELD_OUT_ONE_IN = 8


class Object(NamedTuple):
    """One coloured shape; `place` is an index into PLACES."""

    place: int
    colour: str
    shape: str

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


Scene = tuple[Object, ...]


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


def canonical(objects: Sequence[Object]) -> Scene:
    """The same objects in board order: two scenes are equal exactly when they look alike."""
    return tuple(sorted(objects))


def held_out(scene: Scene) -> bool:
    """True for one scene in HELD_OUT_ONE_IN, which is used in the evaluation only."""
    key = ";".join(f"{o.place},{o.colour},{o.shape}" for o in canonical(scene))
    return hashlib.sha256(key.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def sample_scene(rng: random.Random, *, held: bool, weights: Sequence[int] = (1, 3, 3)) -> Scene:
    """A random scene, held out or not; `weights` are the probabilities of one object, two objects and so on."""
    while True:
        count = rng.choices(range(1, len(weights) + 1), weights)[0]
        places = rng.sample(range(len(PLACES)), count)
        names = [(colour, rng.choice(SHAPES)) for colour in rng.sample(tuple(COLOURS), count)]
        scene = canonical([Object(p, c, s) for p, (c, s) in zip(places, names, strict=True)])
        if held_out(scene) == held:
            return scene


def scenes(seed: int, count: int, *, held: bool) -> list[Scene]:
    """`count` different scenes, the same ones for the same seed."""
    rng = random.Random(seed)
    found: dict[Scene, None] = {}
    while len(found) < count:
        found[sample_scene(rng, held=held)] = None
    return list(found)


# ---------------------------------------------------------------------------------------------- pictures


def _outline(shape: str, x: float, y: float, radius: float, tilt: float) -> list[tuple[float, float]]:
    """Corners of a polygonal shape around (x, y), turned by `tilt` radians."""
    if shape == "square":
        polar = [(1.1, math.pi / 4 + k * math.pi / 2) for k in range(4)]
    elif shape == "triangle":
        polar = [(1.15, -math.pi / 2 + k * 2 * math.pi / 3) for k in range(3)]
    else:  # cross: twelve corners of a plus sign
        arm, half = 1.0, 0.32
        corners = [(half, arm), (half, half), (arm, half), (arm, -half), (half, -half), (half, -arm)]
        corners += [(-a, -b) for a, b in corners]
        polar = [(math.hypot(a, b), math.atan2(b, a)) for a, b in corners]
    return [(x + radius * r * math.cos(a + tilt), y + radius * r * math.sin(a + tilt)) for r, a in polar]


class Placed(NamedTuple):
    """The position of an object in the picture: centre, radius and tilt, in pixels and radians."""

    x: float
    y: float
    radius: float
    tilt: float


def layout(scene: Scene, seed: int) -> list[Placed]:
    """One Placed per object; `seed` varies positions, sizes and tilt within each place."""
    rng = random.Random(seed)
    cell = PICTURE_PX / SIDE
    return [
        Placed(
            x=(o.place % SIDE + 0.5 + rng.uniform(-0.11, 0.11)) * cell,
            y=(o.place // SIDE + 0.5 + rng.uniform(-0.11, 0.11)) * cell,
            radius=rng.uniform(0.27, 0.37) * cell,
            tilt=rng.uniform(-0.17, 0.17),
        )
        for o in scene
    ]


def render(scene: Scene, seed: int) -> Image.Image:
    """The scene as an RGB picture of PICTURE_PX squared, drawn where `layout` says, on slightly tinted paper."""
    rng = random.Random(f"paint {seed}")
    scale = 2  # drawn larger and then downscaled, for smooth edges
    paper = rng.randint(225, 250)
    tint = tuple(paper + rng.randint(-6, 5) for _ in range(3))
    picture = Image.new("RGB", (PICTURE_PX * scale, PICTURE_PX * scale), tint)
    draw = ImageDraw.Draw(picture)
    for (_, colour, shape), placed in zip(scene, layout(scene, seed), strict=True):
        x, y, radius = placed.x * scale, placed.y * scale, placed.radius * scale
        fill = tuple(min(255, max(0, v + rng.randint(-12, 12))) for v in COLOURS[colour])
        if shape == "circle":
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        else:
            draw.polygon(_outline(shape, x, y, radius, placed.tilt), fill=fill)
    return picture.reduce(scale)


def blank() -> Image.Image:
    """A grey picture, to measure how many answers are right without the image."""
    return Image.new("RGB", (PICTURE_PX, PICTURE_PX), (128, 128, 128))


# --------------------------------------------------------------------------------- captions and questions


def phrase(o: Object) -> str:
    return f"a {o.name} at the {PLACES[o.place]}"


def caption(scene: Scene, rng: random.Random) -> str:
    """The objects in random order, in one of three styles; the last (half of all captions) also names empty places.

    "a red circle at the top-left, a blue square at the bottom-right."
    "a circle coloured red at the top-left, a square coloured blue at the bottom-right."
    "at the top-left a red circle, at the top-right nothing, at the bottom-right a blue square."
    """
    match rng.randrange(4):
        case 0:
            phrases = [phrase(o) for o in scene]
        case 1:
            phrases = [f"a {o.shape} coloured {o.colour} at the {PLACES[o.place]}" for o in scene]
        case _:
            empty = empty_places(scene)
            phrases = [f"at the {PLACES[o.place]} a {o.name}" for o in scene]
            phrases += [f"at the {PLACES[p]} nothing" for p in rng.sample(empty, min(len(empty), rng.randint(0, 3)))]
    return ", ".join(rng.sample(phrases, len(phrases))) + "."


def empty_places(scene: Scene) -> list[int]:
    return sorted(set(range(len(PLACES))) - {o.place for o in scene})


def _what(scene: Scene, rng: random.Random) -> Question:
    if rng.random() < 0.25:
        place = rng.choice(empty_places(scene))
        return Question("what", f"What is at the {PLACES[place]}?", "nothing")
    o = rng.choice(scene)
    return Question("what", f"What is at the {PLACES[o.place]}?", f"a {o.name}")


def colours_by_shape(scene: Scene) -> list[Question]:
    """What can be asked about an object by its shape alone: the colour of each shape that is there once."""
    alone = [o for o in scene if sum(p.shape == o.shape for p in scene) == 1]
    return [Question("colour", f"What colour is the {o.shape}?", o.colour) for o in alone]


def _colour(scene: Scene, rng: random.Random) -> Question:
    alone = colours_by_shape(scene)
    if alone and rng.random() < 0.6:
        return rng.choice(alone)
    o = rng.choice(scene)
    return Question("colour", f"What colour is the object at the {PLACES[o.place]}?", o.colour)


def _shape(scene: Scene, rng: random.Random) -> Question:
    alone = [o for o in scene if sum(p.colour == o.colour for p in scene) == 1]
    if alone and rng.random() < 0.6:
        o = rng.choice(alone)
        return Question("shape", f"What shape is the {o.colour} object?", o.shape)
    o = rng.choice(scene)
    return Question("shape", f"What shape is the object at the {PLACES[o.place]}?", o.shape)


def _where(scene: Scene, rng: random.Random) -> Question:
    o = rng.choice(scene)
    return Question("where", f"Where is the {o.name}?", PLACES[o.place])


def _exists(scene: Scene, rng: random.Random) -> Question:
    yes, present = rng.random() < 0.5, {o.colour for o in scene}
    colour = rng.choice([colour for colour in COLOURS if (colour in present) == yes])
    return Question("exists", f"Is there a {colour} object?", "yes" if yes else "no")


def _relation(scene: Scene, rng: random.Random) -> Question | None:
    pairs = [(a, b) for a in scene for b in scene if a is not b]
    rng.shuffle(pairs)
    for a, b in pairs:
        across, down = a.place % SIDE - b.place % SIDE, a.place // SIDE - b.place // SIDE
        options = []
        if across:
            options.append(("left or right of", "left" if across < 0 else "right"))
        if down:
            options.append(("above or below", "above" if down < 0 else "below"))
        words, answer = rng.choice(options)
        return Question("relation", f"Is the {a.name} {words} the {b.name}?", answer)
    return None


def _count(scene: Scene, rng: random.Random) -> Question:
    if rng.random() < 0.5:
        return Question("count", "How many objects are there?", NUMBERS[len(scene)])
    colour = rng.choice([o.colour for o in scene] if rng.random() < 0.7 else sorted(COLOURS))
    number = NUMBERS[sum(o.colour == colour for o in scene)]
    return Question("count", f"How many {colour} objects are there?", number)


_ASKERS = {
    "what": _what,
    "colour": _colour,
    "shape": _shape,
    "where": _where,
    "exists": _exists,
    "relation": _relation,
    "count": _count,
}


def one_of_each_kind(scene: Scene, rng: random.Random) -> list[Question]:
    """A question of every kind that the scene allows (a relation needs two objects), in random order."""
    questions = [_ASKERS[kind](scene, rng) for kind in rng.sample(KINDS, len(KINDS))]
    return [question for question in questions if question is not None]


def ask(scene: Scene, rng: random.Random, count: int) -> list[Question]:
    """`count` different questions about a scene, as many of each kind as possible."""
    found: dict[str, Question] = {}
    while len(found) < count:
        for question in one_of_each_kind(scene, rng):
            found.setdefault(question.text, question)
    return list(found.values())[:count]
