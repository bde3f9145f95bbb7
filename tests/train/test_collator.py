"""What the collator makes of examples, and which it refuses."""

import copy
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import make_pairs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from bpo_fast.train.collator import PreferenceCollator


@pytest.fixture
def collate(processor):
    def collate(examples, **options):
        collator = PreferenceCollator(processor, image_token_id=processor.image_token_id, **options)
        return collator(examples)["sequences"]

    return collate


def ids(processor, text):
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def text_of(example, name):
    return example[name][0]["content"][-1]["text"]


def test_plain_strings_are_one_turn_each(collate):
    (example,) = make_pairs(1)
    plain = {
        "images": example["images"],
        **{name: text_of(example, name) for name in ("prompt", "chosen", "rejected")},
    }
    (expected,), (found,) = collate([example]), collate([plain])
    assert torch.equal(found.packing.input_ids, expected.packing.input_ids)
    assert torch.equal(found.image_inputs["pixel_values"], expected.image_inputs["pixel_values"])


def test_images_are_those_of_the_reader(collate):
    (example,) = make_pairs(1)
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    eight = Image.fromarray((grey // 257).astype(np.uint8)).convert("RGB")
    (expected,) = collate([example | {"images": [eight]}])
    (found,) = collate([example | {"images": [Image.fromarray(grey)]}])
    assert torch.equal(found.image_inputs["pixel_values"], expected.image_inputs["pixel_values"])


@pytest.mark.parametrize("as_json", [False, True])
def test_template_options_and_tools_of_a_row_are_rendered(processor, collate, monkeypatch, as_json):
    template = "{{ mood or '' }} {% for tool in tools or [] %}{{ tool['name'] }} {{ tool | length }} {% endfor %}"
    monkeypatch.setattr(processor, "chat_template", template + processor.chat_template)
    (example,) = make_pairs(1)
    (plain,) = collate([example | {"tools": None, "chat_template_kwargs": None}])
    # None is what an Arrow schema puts where a row lacks a key of another row.
    options = {"tools": [{"name": "w7", "strict": None}], "chat_template_kwargs": {"mood": "w8", "depth": None}}
    options = {name: json.dumps(value) if as_json else value for name, value in options.items()}
    (found,) = collate([example | options])
    extra = processor.tokenizer.convert_tokens_to_ids(["w8", "w7"])
    expected = plain.packing.input_ids.tolist()
    assert found.packing.input_ids.tolist() == [*extra, processor.tokenizer.unk_token_id, *expected]


def test_rows_with_and_without_images_share_a_batch(processor, collate):
    with_image, without = copy.deepcopy(make_pairs(2))
    without |= {"images": None, "prompt": "w1 w2"}
    (both,) = collate([with_image, without])
    (alone,) = collate([with_image])
    assert torch.equal(both.image_inputs["pixel_values"], alone.image_inputs["pixel_values"])
    assert torch.equal(both.image_rows, alone.image_rows)
    rest = both.packing.input_ids[len(alone.packing.input_ids) :].tolist()
    assert rest[:5] == ids(processor, "<s> USER: w1 w2 ASSISTANT:")


def test_the_same_answers_are_no_preference(collate):
    (example,) = make_pairs(1)
    example["rejected"] = copy.deepcopy(example["chosen"])
    with pytest.raises(
        ValueError, match=r"^chosen and rejected: found the same \d+ tokens '.*' for both, expected a pr"
    ):
        collate([example])
    assert collate([example], responses=("chosen",))
    example |= {"chosen": "w1 w2 w3 w4", "rejected": "w1 w2 w3 w5"}
    (sequence,) = collate([example])
    length = sequence.packing.prefix_lengths[0] + 3
    with pytest.raises(ValueError, match="raise max_length if it cut the difference off"):
        collate([example], max_length=length)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompt": None}, "example: found no 'prompt', expected prompt, chosen, rejected"),
        ({"rejected": None}, "example: found no 'rejected', expected prompt, chosen, rejected"),
        ({"images": ["1.png"]}, r"images: found '1\.png', expected decoded images; see bpo_fast\.data\.read_image"),
        ({"images": {"bytes": b"", "path": None}}, "images: found {'bytes': b''"),
        ({"images": []}, "prompt: found 1 image placeholders for 0 images"),
        ({"chosen": "w1 <image>"}, "answer: found <image> in the text 'w1 <image>', expected none"),
        ({"tools": "{"}, "tools: found '{', expected a list or its JSON text"),
        ({"tools": {"name": "w1"}}, "tools: found {'name': 'w1'}, expected a list or its JSON text"),
        ({"chat_template_kwargs": "[1]"}, r"chat_template_kwargs: found \[1\], expected a dict or its JSON text"),
        (
            {"chat_template_kwargs": {"tokenize": True}},
            "chat_template_kwargs: found 'tokenize', expected variables of the chat template alone",
        ),
    ],
)
def test_what_is_no_example_is_one_sentence(collate, change, sentence):
    (example,) = make_pairs(1)
    with pytest.raises(ValueError, match=f"^{sentence}"):
        collate([example | change])


def test_columns_that_lack_are_named(collate):
    (example,) = make_pairs(1)
    for name in ("images", "prompt", "chosen", "rejected"):
        lacking = {key: value for key, value in example.items() if key != name}
        with pytest.raises(ValueError, match=f"^example: found no '{name}', expected"):
            collate([lacking])


def test_a_truncated_image_is_no_image(collate):
    (example,) = make_pairs(1)
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "PNG")
    half = Image.open(io.BytesIO(file.getvalue()[: len(file.getvalue()) // 2]))
    with pytest.raises((OSError, SyntaxError, ValueError)):
        collate([example | {"images": [half]}])


class _Copies(TorchDispatchMode):
    """Counts the tensors that change their device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default
        return function(*args, **kwargs or {})


def parts(sequence):
    return [*sequence.packing.tensors(), sequence.image_rows, *sequence.image_inputs.values()]


def test_a_packed_sequence_is_one_transfer(collate):
    (sequence,) = collate(make_pairs(3))
    assert len(parts(sequence)) == 18  # 16 of the packing, whose rounds are two each
    with _Copies() as copies:
        moved = sequence.to("meta", non_blocking=True)
    assert copies.count == 1
    assert {tensor.device.type for tensor in parts(moved)} == {"meta"}
    assert [tensor.shape for tensor in parts(moved)] == [tensor.shape for tensor in parts(sequence)]
    assert (moved.batch, moved.numbers) == (sequence.batch, sequence.numbers)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_worker_sends_the_same_tensors_as_one(collate, num_workers):
    examples = [dict(example, number=n) for n, example in enumerate(make_pairs(4))]
    loader = DataLoader(examples, batch_size=2, num_workers=num_workers, collate_fn=lambda rows: collate(rows))
    for (found,), (expected,) in zip(loader, (collate(examples[:2]), collate(examples[2:])), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(parts(found), parts(expected), strict=True))
        assert (found.batch, found.numbers) == (expected.batch, expected.numbers)
        assert found.packing.branch_lengths == expected.packing.branch_lengths
        storages = {tensor.untyped_storage().data_ptr() for tensor in parts(found)}
        assert len(storages) == (1 if num_workers else 18)
