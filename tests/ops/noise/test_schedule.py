"""NoiseSchedule against the published formulas."""

import math

import pytest
import torch

from bpo_fast import NoiseSchedule

SIGMOID = [  # t, abar, sqrt(abar), sqrt(1 - abar), T = 1000
    (0, 0.999978, 0.999989, 0.004726),
    (300, 0.962329, 0.980984, 0.194089),
    (500, 0.744799, 0.863017, 0.505175),
    (700, 0.351266, 0.592677, 0.805440),
    (900, 0.133143, 0.364888, 0.931051),
    (999, 0.081249, 0.285042, 0.958515),
]


@pytest.mark.parametrize(("step", "alpha_bar", "signal", "noise"), SIGMOID)
def test_sigmoid_known_answers(step, alpha_bar, signal, noise):
    schedule = NoiseSchedule.sigmoid()
    assert schedule.alpha_bar[step].item() == pytest.approx(alpha_bar, abs=6e-7)
    assert schedule.scales(step) == pytest.approx((signal, noise), abs=6e-7)


def alpha_bar_by_hand(beta, num_steps):
    kept, values = 1.0, []
    for t in range(num_steps):
        kept *= 1 - beta(t)
        values.append(kept)
    return values


@pytest.mark.parametrize("num_steps", [2, 10, 1000])
def test_linear_is_ddpm(num_steps):
    expected = alpha_bar_by_hand(lambda t: 1e-4 + (0.02 - 1e-4) * t / (num_steps - 1), num_steps)
    assert NoiseSchedule.linear(num_steps).alpha_bar.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("num_steps", [1, 10, 1000])
def test_cosine_is_nichol_dhariwal(num_steps):
    def f(i):
        return math.cos((i / num_steps + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = alpha_bar_by_hand(lambda t: min(1 - f(t + 1) / f(t), 0.999), num_steps)
    assert NoiseSchedule.cosine(num_steps).alpha_bar.tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("build", [NoiseSchedule.sigmoid, NoiseSchedule.linear, NoiseSchedule.cosine])
def test_properties(build):
    schedule = build(50)
    assert schedule.num_steps == 50
    assert schedule.alpha_bar.shape == (50,)
    assert schedule.alpha_bar.dtype == torch.float64
    assert bool((schedule.alpha_bar.diff() < 0).all())
    table = schedule.table()
    assert table.dtype == torch.float32
    assert table.is_contiguous()
    for step in (0, 17, 49):
        signal, noise = schedule.scales(step)
        assert signal**2 + noise**2 == pytest.approx(1, abs=1e-12)
        assert table[step].tolist() == torch.tensor([signal, noise], dtype=torch.float32).tolist()
    assert schedule.table() is table


def test_a_schedule_of_ones_own():
    schedule = NoiseSchedule([1.0, 0.25])
    assert schedule.scales(1) == pytest.approx((0.5, math.sqrt(0.75)))


@pytest.mark.parametrize("step", [-1, 1000])
def test_step_out_of_range(step):
    with pytest.raises(
        ValueError, match=rf"^step: found {step}, expected 0 to 999, the steps of the sigmoid schedule\.$"
    ):
        NoiseSchedule.sigmoid().scales(step)


@pytest.mark.parametrize("num_steps", [0, -3, 2.5, True])
def test_bad_num_steps(num_steps):
    with pytest.raises(ValueError, match=rf"^num_steps: found {num_steps}, expected an int of at least 1\.$"):
        NoiseSchedule.cosine(num_steps)


@pytest.mark.parametrize(
    ("alpha_bar", "found"),
    [
        ([0.5, 0.6], "0.6 at step 1"),
        ([1.1], "1.1 at step 0"),
        ([0.5, -0.1], "-0.1 at step 1"),
        ([0.5, float("nan")], "nan at step 1"),
        ([], r"shape \[0\]"),
        ([[0.5]], r"shape \[1, 1\]"),
    ],
)
def test_bad_alpha_bar(alpha_bar, found):
    with pytest.raises(ValueError, match=rf"^alpha_bar: found {found}, expected "):
        NoiseSchedule(alpha_bar)
