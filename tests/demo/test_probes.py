import random

import pytest
import torch

from bpo_fast.answers.score import score_branches
from bpo_fast.bootstrap import weaken
from bpo_fast.demo import tiny_llava, world
from bpo_fast.demo.probes import LogpsProbe, likelihood_by_step
from bpo_fast.models.load import load_model, load_processor
from bpo_fast.models.packed_forward import enable_packed_forward
from bpo_fast.models.prompt import question, render

CHECKPOINT = tiny_llava.CHECKPOINT


@pytest.fixture(scope="module")
def plain():
    return load_model(CHECKPOINT, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def packed():
    model = load_model(CHECKPOINT, dtype=torch.float32, device="cpu")
    enable_packed_forward(model)
    return model


@pytest.fixture(scope="module")
def processor():
    return load_processor(CHECKPOINT)


def reference_logp(model, processor, image, prefix, branch):
    """Sum of the branch's token log-probs, by the model's own forward on this sequence alone."""
    batch = tiny_llava.collate(processor, [image], [prefix], [branch])
    labels = batch.pop("labels")[0, 1:]
    with torch.no_grad():
        logps = model(**batch).logits[0, :-1].double().log_softmax(-1)
    rows = torch.nonzero(labels != -100).flatten()
    return logps[rows, labels[rows]].sum()


def test_branches_score_as_separate_sequences(plain, packed, processor):
    rng = random.Random(0)
    images = [world.draw(world.sample_scene(rng, 0.5)) for _ in range(3)]
    prefixes = [render(processor, question(world.QUESTIONS[kind]))[0] for kind in ("describe", "right", "ground")]
    branches = [
        [" A star.</s>", " Two red circles."],
        [" There is a blue star.</s>", " No"],
        [" Sand.", " The ground"],
    ]
    found = score_branches(packed, processor, images, prefixes, branches)
    assert found.shape == (3, 2)
    for row in range(3):
        for column in range(2):
            expected = reference_logp(plain, processor, images[row], prefixes[row], branches[row][column])
            assert found[row, column].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)


def test_likelihood_is_that_of_the_words_at_the_place_of_the_right_object(plain, packed, processor):
    scene = world.Scene(world.Object("red", "circle"), world.Object("green", "star"), 3, "snow", layout_seed=4)
    found = likelihood_by_step(packed, processor, [scene], [None, 700], seed=5)
    before = " On the left there is a red circle. On the right there are three"
    prefix = render(processor, question(world.QUESTIONS["describe"]))[0] + before
    assert found["steps"] == [None, 700]
    for place, step in enumerate(found["steps"]):
        for name, words in (("true", " green stars"), ("typical", " blue squares")):
            with weaken(plain, step, seed=5):
                expected = reference_logp(plain, processor, world.draw(scene), prefix, words).exp()
            assert found[name][place] == pytest.approx(expected.item(), rel=1e-4)


def test_probe_measures_the_same_pairs_at_its_interval_and_at_the_end(packed, processor):
    def turn(role, *parts):
        return [{"role": role, "content": list(parts)}]

    image = world.draw(world.sample_scene(random.Random(1), 0.0))
    pair = {
        "images": [image],
        "prompt": turn("user", {"type": "image", "text": None}, {"type": "text", "text": "What is on the right?"}),
        "chosen": turn("assistant", {"type": "text", "text": "There is a red star."}),
        "rejected": turn("assistant", {"type": "text", "text": "There are two blue squares."}),
    }
    probe = LogpsProbe(processor, [pair], interval=2)

    class State:
        global_step, max_steps = 0, 5

    probe.on_train_begin(None, State, None, model=packed)
    for State.global_step in range(1, 6):
        probe.on_step_end(None, State, None, model=packed)
    assert [point["step"] for point in probe.history] == [0, 2, 4, 5]
    prompt = render(processor, question("What is on the right?"))[0]
    branches = [" There is a red star.</s>", " There are two blue squares.</s>"]
    chosen, rejected = score_branches(packed, processor, [image], [prompt], [branches])[0].tolist()
    assert all((point["chosen"], point["rejected"]) == (chosen, rejected) for point in probe.history)
