"""No step waits for its device: what would be read back, or copied from pageable memory, is counted on the CPU."""

import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_models import make_llava, make_pairs, make_processor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from bpo_fast import BPOConfig, BPOTrainer

ATEN = torch.ops.aten
# Operators whose result, or its size, the host must know; on a GPU each waits until it is computed.
READ_BACK = {
    ATEN._local_scalar_dense.default,
    ATEN.equal.default,
    ATEN.nonzero.default,
    ATEN.masked_select.default,
    ATEN.unique_dim.default,
    ATEN._unique2.default,
    ATEN.bincount.default,
    ATEN.repeat_interleave.Tensor,
}
# Methods that read values where they lie on a CPU, and functions that make a tensor of the host's numbers.
READERS = {torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.__bool__}
READERS |= {torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__index__}
MAKERS = {torch.tensor, torch.as_tensor, torch.Tensor.new_tensor, torch.from_numpy, torch.scalar_tensor}


def site():
    """The innermost function of the packages that train, which a wait is to be blamed on."""
    for frame in reversed(traceback.extract_stack()):
        if any(part in frame.filename for part in ("/bpo_fast/", "/transformers/", "/accelerate/", "/peft/")):
            return f"{Path(frame.filename).name}:{frame.name}"
    return "elsewhere"


class Waits:
    """Counts, by place, what would make a GPU's host wait."""

    def __init__(self):
        self.found = Counter()
        found = self.found

        class Operators(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                indices = (
                    args[1] if function in (ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default) else ()
                )
                masks = [x for x in indices if isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)]
                if function in READ_BACK or masks:
                    found[site()] += 1
                return function(*args, **kwargs or {})

        class Functions(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                if function in READERS or function in MAKERS:
                    found[site()] += 1
                return function(*args, **kwargs or {})

        self.modes = (Operators, Functions)

    def __enter__(self):
        self.entered = [mode() for mode in self.modes]
        for mode in self.entered:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self.entered):
            mode.__exit__(*error)


class Watch(TrainerCallback):
    """Enters a context where the second step begins, since the first one's gradients are looked at.

    It is left when the last one ends or, for what is loaded between them on this thread, at the end of each.
    """

    def __init__(self, context, steps_alone):
        self.context, self.steps_alone = context, steps_alone

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1 or (state.global_step > 1 and self.steps_alone):
            self.context.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps or (state.global_step > 1 and self.steps_alone):
            self.context.__exit__(None, None, None)


def train(folder, context, model=None, **options):
    options = {"use_cpu": True, "max_steps": 4, "gradient_accumulation_steps": 2, "token_budget": 60} | options
    trainer = BPOTrainer(
        model=model or make_llava(),
        args=BPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=3,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **options,
        ),
        train_dataset=Dataset.from_list(make_pairs(24)),
        processing_class=make_processor(),
        callbacks=[Watch(context, steps_alone=options["use_cpu"])],
        peft_config=LoraConfig(r=2),
    )
    trainer.train()
    return trainer


def test_the_count_sees_what_it_counts():
    x = torch.arange(4.0)
    with Waits() as waits:
        x.sum().item()
        x.tolist()
        x[x > 1]
        bool(x[0] > 1)
        torch.tensor([1.0])
        x.nonzero()
    assert sum(waits.found.values()) >= 6
    with Waits() as waits:
        x[torch.arange(2)].sum() + torch.full((), 3.0)
    assert not waits.found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"checkpointing": "selective"},
        {"checkpointing": "offload", "loss_type": ["sft"]},
        {"ld_alpha": 0.5, "use_weighting": True, "checkpointing": "none"},
        {"loss_type": ["ipo"], "lr_scheduler_type": "cosine", "warmup_steps": 2},
        {"loss_type": ["mdpo"], "token_budget": 70},
    ],
)
def test_no_step_waits_between_logs(tmp_path, options):
    waits = Waits()
    trainer = train(tmp_path, waits, **options)
    assert trainer.state.global_step == 4
    # On a CPU a step's loss and norm are judged at its end, with two reads; on a GPU one step later, without any.
    assert waits.found == {"finite.py:_judge": 3 * 2}


@pytest.mark.gpu("reports of synchronisations")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device that reports synchronisations")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"checkpointing": "selective"},
        {"checkpointing": "offload"},
        {"loss_type": ["mdpo"], "token_budget": 70},
        {"loss_type": ["mdpo"], "token_budget": 70, "noise_target": "projected"},
    ],
)
def test_no_step_synchronises_a_gpu(tmp_path, options):
    class Synchronisations:
        def __enter__(self):
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *error):
            torch.cuda.set_sync_debug_mode("default")

    trainer = train(
        tmp_path, Synchronisations(), make_llava().cuda(), use_cpu=False, dataloader_num_workers=1, **options
    )
    assert trainer.state.global_step == 4
