"""Many tensors in one buffer: the same values, and one call for all."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from bpo_fast.models.one_buffer import in_one_buffer, out_of_buffer, together


def tensors():
    return [
        torch.arange(5),
        torch.tensor([7, 8, 9], dtype=torch.int32),
        torch.zeros(0, dtype=torch.int64),
        torch.linspace(0, 1, 6).view(2, 3),
        torch.tensor(3.5, dtype=torch.bfloat16),
        torch.tensor([True, False]),
        torch.arange(12.0).view(3, 4).t(),
    ]


def test_values_shapes_and_types_stay():
    buffer, places = in_one_buffer(tensors())
    found = out_of_buffer(buffer, places)
    for tensor, expected in zip(found, tensors(), strict=True):
        assert torch.equal(tensor, expected)
        assert tensor.dtype == expected.dtype
        assert tensor.storage_offset() * tensor.element_size() % 256 == 0


def test_one_call_for_all_and_no_copy_of_what_lies_together():
    seen = []
    first = together(tensors(), lambda buffer: seen.append(buffer) or buffer.clone())
    again = together(first, lambda buffer: seen.append(buffer) or buffer)
    assert len(seen) == 2
    assert all(x.data_ptr() == y.data_ptr() for x, y in zip(first, again, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(again, tensors(), strict=True))


@pytest.mark.parametrize("other", [lambda x: x[::-1], lambda x: x[:-1], lambda x: [x[0], x[1] + 1, *x[2:]]])
def test_other_tensors_of_a_buffer_are_laid_out_anew(other):
    parts = other(together(tensors(), torch.clone))
    found = together(parts, torch.clone)
    assert all(torch.equal(x, y) for x, y in zip(found, parts, strict=True))


def test_nothing_is_nothing():
    assert together([], torch.clone) == []


def test_fake_tensors_lie_together_too():
    with FakeTensorMode():
        found = together([torch.empty(3, 2), torch.empty(4, dtype=torch.int64)], torch.clone)
        assert [(x.shape, x.dtype) for x in found] == [((3, 2), torch.float32), ((4,), torch.int64)]
        assert together(found, torch.clone)[0].shape == (3, 2)
