"""Bytes are counted where they are moved, and nowhere else."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bpo_fast.plan.meter import Meter
from bpo_fast.plan.operations import ON_CPU


def test_questions_about_a_fake_tensor_and_views_of_it_move_nothing():
    with FakeTensorMode():
        x, weight = torch.empty(2, 4, 8), torch.empty(8, 8)
        meter = Meter(ON_CPU)
        with meter:
            assert x.device.type == "cpu"
            y = x @ weight  # by way of rows, and back
            assert y.device == x.device
            assert y.add(1.0).shape == x.shape
    assert meter.metered.product_bytes == 4 * (64 + 64 + 64)
    assert meter.metered.other_bytes == 4 * (64 + 64)
    assert meter.metered.total_flops == 2 * 8 * 8 * 8
