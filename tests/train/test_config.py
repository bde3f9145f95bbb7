"""The loss options of BPOConfig are those of LossConfig, and none is written a second time."""

from dataclasses import MISSING, fields

import pytest
from transformers import HfArgumentParser

from bpo_fast import BPOConfig, LossConfig

OPTIONS = fields(LossConfig)
VALUES = {
    "loss_type": (["robust", "sft"], ["robust", "sft"]),
    "loss_weights": (["1.0", "0.5"], [1.0, 0.5]),
    "label_smoothing": (["0.2"], 0.2),
    "average_logps": (["true"], True),
    "ld_alpha": (["0.5"], 0.5),
}


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_defaults_and_help_are_those_of_the_loss_config(option):
    (found,) = (item for item in fields(BPOConfig) if item.name == option.name)
    default = found.default if found.default_factory is MISSING else found.default_factory()
    assert default in (option.default, [option.default])
    assert found.metadata["help"] == option.metadata["help"]


def test_options_reach_the_loss_by_the_command_line(tmp_path):
    argv = [word for name, (words, _) in VALUES.items() for word in (f"--{name}", *words)]
    (config,) = HfArgumentParser([BPOConfig]).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", *argv]
    )
    loss_config = config.loss_config()
    assert {name: getattr(loss_config, name) for name in VALUES} == {
        name: value for name, (_, value) in VALUES.items()
    }
    untouched = [option for option in OPTIONS if option.name not in VALUES]
    assert all(getattr(loss_config, option.name) == option.default for option in untouched)


def test_the_output_folder_is_the_first_argument_as_in_trl(tmp_path):
    assert BPOConfig(str(tmp_path), use_cpu=True).output_dir == str(tmp_path)


def test_ligers_kernels_are_for_a_gpu(tmp_path):
    assert not BPOConfig(str(tmp_path), use_cpu=True, bf16=False).fuses_elementwise
    with pytest.raises(
        ValueError, match="use_liger_kernel: found True on cpu, expected False, since its kernels run on"
    ):
        BPOConfig(str(tmp_path), use_cpu=True, bf16=False, use_liger_kernel=True)
