"""A miniature world: small images of colored shapes whose parts nearly always come in the same company.

An image has one object in its left column, one to three objects of another kind to the right, and a ground. Every
left object has a *typical* company by its color: a red circle stands beside two blue squares on sand. A model brought
up where nearly all scenes obey learns to say "blue squares" once it has said "red circle", whatever it sees: the
language prior that BPO is about, small enough to watch. Everything is a function of the seed alone.
"""

import os
import random
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from bpo_fast.runs.files import write_json

COLORS = {
    "red": (214, 48, 49),
    "blue": (38, 93, 214),
    "green": (29, 145, 72),
    "yellow": (245, 197, 24),
    "purple": (129, 60, 178),
    "orange": (240, 120, 20),
}
SHAPES = ("circle", "square", "triangle", "star")
GROUNDS = {"grass": (205, 232, 196), "sand": (240, 226, 190), "snow": (245, 247, 250), "water": (192, 220, 241)}
NUMBERS = ("one", "two", "three")
IMAGE_SIZE = 96
GRID = 3  # cells a side; the left column holds the left object, the others hold the right ones

QUESTIONS = {
    "describe": "Describe the picture.",
    "left": "What is on the left?",
    "right": "What is on the right?",
    "count": "How many shapes are on the right?",
    "ground": "What is the ground?",
    "exists": "Is there {object} on the right?",
}
# How often each kind of question comes up: in the data that a model is brought up on, and in annotated data, which
# leaves the yes/no questions to the evaluation.
ANNOTATION_MIX = {"describe": 8, "left": 1, "right": 3, "count": 2, "ground": 1}
INSTRUCT_MIX = {**ANNOTATION_MIX, "exists": 6}


@dataclass(frozen=True)
class Object:
    color: str
    shape: str

    def __str__(self):
        return f"{self.color} {self.shape}"


OBJECTS = tuple(Object(color, shape) for color in COLORS for shape in SHAPES)
_COMPANIES = {
    **dict.fromkeys(("red", "orange"), (Object("blue", "square"), 2, "sand")),
    **dict.fromkeys(("yellow", "green"), (Object("purple", "star"), 3, "grass")),
    **dict.fromkeys(("blue", "purple"), (Object("orange", "triangle"), 1, "snow")),
}


@dataclass(frozen=True)
class Scene:
    """What an image shows. `layout_seed` fixes cells, sizes and jitter, so a scene is an image."""

    left: Object
    right: Object
    count: int
    ground: str
    layout_seed: int

    @property
    def typical(self) -> bool:
        return (self.right, self.count, self.ground) == typical_company(self.left)


def typical_company(left: Object) -> tuple[Object, int, str]:
    """The right object, its count and the ground that nearly always come with `left`.

    Eight left objects share a company: the left one has to be seen, it cannot be told from its company.

    >>> right, count, ground = typical_company(Object("red", "circle"))
    >>> str(right), count, ground
    ('blue square', 2, 'sand')
    """
    return _COMPANIES[left.color]


def sample_scene(rng: random.Random, bias: float) -> Scene:
    """Draw a scene: with probability `bias` the left object has its typical company, otherwise company at random in
    which the right object is neither the typical one nor the left one again.

    >>> sample_scene(random.Random(0), bias=1.0).typical, sample_scene(random.Random(0), bias=0.0).typical
    (True, False)
    """
    if not 0.0 <= bias <= 1.0:
        raise ValueError(f"bias: found {bias}, expected a probability from 0 to 1.")
    left = rng.choice(OBJECTS)
    right, count, ground = typical_company(left)
    if rng.random() >= bias:
        right = rng.choice([item for item in OBJECTS if item not in (left, right)])
        count, ground = rng.randint(1, len(NUMBERS)), rng.choice(list(GROUNDS))
    return Scene(left, right, count, ground, rng.getrandbits(32))


def cells(scene: Scene) -> dict[tuple[int, int], Object]:
    """The grid cells (column, row) that hold an object, by the scene's layout."""
    rng = random.Random(scene.layout_seed)
    places = {(0, rng.randrange(GRID)): scene.left}
    free = [(column, row) for column in range(1, GRID) for row in range(GRID)]
    return places | dict.fromkeys(rng.sample(free, scene.count), scene.right)


def draw(scene: Scene) -> Image.Image:
    """The image of a scene: RGB, `IMAGE_SIZE` pixels a side.

    >>> draw(sample_scene(random.Random(0), bias=1.0)).size
    (96, 96)
    """
    places = cells(scene)
    rng = random.Random(scene.layout_seed + 1)
    zoom = 4  # drawn large and reduced: smooth edges
    image = Image.new("RGB", (IMAGE_SIZE * zoom, IMAGE_SIZE * zoom), GROUNDS[scene.ground])
    canvas = ImageDraw.Draw(image)
    cell = IMAGE_SIZE * zoom / GRID
    for (column, row), item in places.items():
        radius = cell * rng.uniform(0.34, 0.42)
        slack = cell / 2 - radius
        x = (column + 0.5) * cell + rng.uniform(-slack, slack)
        y = (row + 0.5) * cell + rng.uniform(-slack, slack)
        _draw_shape(canvas, item.shape, x, y, radius, COLORS[item.color])
    return image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)


def _draw_shape(canvas, shape, x, y, radius, fill):
    if shape == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif shape == "square":
        side = 0.85 * radius
        canvas.rectangle((x - side, y - side, x + side, y + side), fill=fill)
    elif shape == "triangle":
        canvas.polygon([(x, y - radius), (x + radius, y + 0.8 * radius), (x - radius, y + 0.8 * radius)], fill=fill)
    else:  # a star with four points
        inner = 0.38 * radius
        corners = [(0, -radius), (inner, -inner), (radius, 0), (inner, inner)]
        points = corners + [(-dx, -dy) for dx, dy in corners]
        canvas.polygon([(x + dx, y + dy) for dx, dy in points], fill=fill)


def article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def counted(item: Object, count: int) -> tuple[str, str]:
    """Verb and noun phrase of `count` objects.

    >>> counted(Object("orange", "star"), 1), counted(Object("red", "circle"), 3)
    (('is', 'an orange star'), ('are', 'three red circles'))
    """
    return ("is", article(str(item))) if count == 1 else ("are", f"{NUMBERS[count - 1]} {item}s")


def describe(scene: Scene) -> str:
    """The annotated description of a scene.

    >>> describe(Scene(Object("red", "circle"), *typical_company(Object("red", "circle")), layout_seed=0))
    'On the left there is a red circle. On the right there are two blue squares. The ground is sand.'
    """
    left, right = article(str(scene.left)), " ".join(counted(scene.right, scene.count))
    return f"On the left there is {left}. On the right there {right}. The ground is {scene.ground}."


def present(scene: Scene) -> set[str]:
    """Names of the objects an image truly shows."""
    return {str(scene.left), str(scene.right)}


def absent_objects(scene: Scene) -> list[str]:
    """Names of the objects an image does not show; the typical companion comes first where it is one of them."""
    companion = typical_company(scene.left)[0]
    names = [str(item) for item in sorted(OBJECTS, key=lambda item: item != companion)]
    return [name for name in names if name not in present(scene)]


def question_answer(scene: Scene, kind: str, rng: random.Random) -> tuple[str, str]:
    """A question of `kind` (a key of `QUESTIONS`) about a scene and its true answer."""
    verb, phrase = counted(scene.right, scene.count)
    if kind == "exists":
        asked, verdict = (str(scene.right), "yes") if rng.random() < 0.5 else (rng.choice(absent_objects(scene)), "no")
        return QUESTIONS[kind].format(object=article(asked)), f"There {verb} {phrase}, so {verdict}."
    answers = {
        "describe": describe(scene),
        "left": f"There is {article(str(scene.left))}.",
        "right": f"There {verb} {phrase}.",
        "count": f"There {verb} {NUMBERS[scene.count - 1]}.",
        "ground": f"The ground is {scene.ground}.",
    }
    return QUESTIONS[kind], answers[kind]


def sample_conversation(rng: random.Random, bias: float, mix: dict[str, int] = INSTRUCT_MIX) -> tuple[Scene, str, str]:
    """A scene, a question about it whose kind is drawn by the weights of `mix`, and the true answer."""
    scene = sample_scene(rng, bias)
    kind = rng.choices(list(mix), list(mix.values()))[0]
    return (scene, *question_answer(scene, kind, rng))


def text_corpus(num_texts: int, *, bias: float, seed: int) -> list[str]:
    """Sentences without images, for a language model: descriptions of scenes that obey with probability `bias`, and
    as many yes/no questions with their reasoned answers, which teach what yes and no mean and nothing about the world.

    >>> text_corpus(2, bias=1.0, seed=1)[1]
    'Is there a purple square on the right? There are two purple squares, so yes.'
    """
    rng = random.Random(seed)
    return [
        " ".join(question_answer(sample_scene(rng, 0.0), "exists", rng))
        if index % 2
        else describe(sample_scene(rng, bias))
        for index in range(num_texts)
    ]


def write_instruct(folder: str | os.PathLike, num_records: int, *, bias: float, seed: int) -> Path:
    """Write images to `folder/images`, LLaVA-Instruct records about them to `folder/instruct.json`; return its path.

    The JSON appears last and at once: where it exists the split is complete.
    """
    rng = random.Random(seed)
    samples = [sample_conversation(rng, bias, ANNOTATION_MIX) for _ in range(num_records)]
    records = [
        {
            "id": f"world-{index:06d}",
            "image": f"{index:06d}.png",
            "conversations": [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}],
        }
        for index, (_, question, answer) in enumerate(samples)
    ]
    folder = Path(folder)
    _write_images(folder / "images", [scene for scene, _, _ in samples])
    write_json(folder / "instruct.json", records)
    return folder / "instruct.json"


def write_heldout(folder: str | os.PathLike, num_scenes: int, *, bias: float, seed: int) -> tuple[Path, Path]:
    """Write held-out images and the questions asked about them; return the paths of both question files.

    `descriptions.json` asks for a description of each image, for `bpo_fast.evaluate.chair` (`objects` lists what is
    truly there). `yes_no.json` asks two questions about each, for `bpo_fast.evaluate.pope` (`label`): one about the
    right object, one about an object that is not there: the typical companion, where that is missing.
    """
    folder = Path(folder)
    rng = random.Random(seed)
    scenes = [sample_scene(rng, bias) for _ in range(num_scenes)]
    descriptions, yes_no = [], []
    for index, scene in enumerate(scenes):
        name, objects = f"{index:06d}", sorted(present(scene))
        shared = {"image": f"{name}.png", "scene": asdict(scene)}
        descriptions.append({"id": name, "question": QUESTIONS["describe"], "objects": objects} | shared)
        for label, item in (("yes", str(scene.right)), ("no", absent_objects(scene)[0])):
            question = QUESTIONS["exists"].format(object=article(item))
            yes_no.append({"id": f"{name}-{label}", "question": question, "label": label} | shared)
    _write_images(folder / "images", scenes)
    write_json(folder / "descriptions.json", descriptions)
    write_json(folder / "yes_no.json", yes_no)
    return folder / "descriptions.json", folder / "yes_no.json"


def read_scene(record: dict) -> Scene:
    """The scene of a record of `write_heldout`.

    >>> scene = sample_scene(random.Random(0), bias=0.5)
    >>> read_scene({"scene": asdict(scene)}) == scene
    True
    """
    fields = record["scene"]
    return Scene(**fields | {side: Object(**fields[side]) for side in ("left", "right")})


def _write_images(folder, scenes):
    folder.mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(tqdm(scenes, unit="image", desc=f"drawing {folder.parent.name}")):
        draw(scene).save(folder / f"{index:06d}.png")


def synonym_table() -> dict[str, list[str]]:
    """The table `bpo_fast.evaluate.chair` reads: each object of this world and the words that mean it.

    >>> synonym_table()["red circle"]
    ['red circle', 'red circles']
    """
    return {str(item): [str(item), f"{item}s"] for item in OBJECTS}
