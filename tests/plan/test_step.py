"""The step on fake tensors beside the same step on real ones, whose memory the CPU's allocator reports."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_models import make_llava, make_pairs, make_processor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from bpo_fast.plan import step as step_module
from bpo_fast.plan.lengths import PAPER_MIX, groups_of
from bpo_fast.plan.meter import INSIDE, KEPT, TRANSIENT
from bpo_fast.plan.operations import ON_CPU
from bpo_fast.plan.step import (
    ADAPTER,
    GRADIENTS,
    OPTIMIZER,
    TABLES,
    VISION,
    WEIGHTS,
    Run,
    count_step,
    packed_sequences,
)
from bpo_fast.train.config import BPOConfig
from bpo_fast.train.trainer import BPOTrainer

SIZE, PATCH, WIDTH, VOCAB = 64, 8, 256, 2048
TOKENS = (SIZE // PATCH) ** 2
TEXT = {"hidden_size": WIDTH, "intermediate_size": 640, "num_hidden_layers": 3}
GROUPS = groups_of(PAPER_MIX.pairs(3), TOKENS)
CASES = {
    "recomputed": {},
    "nothing recomputed": {"checkpointing": "none", "token_budget": 600},
    "caches": {"precompute_ref_log_probs": True, "cache_image_features": True},
    "bf16 autocast": {"bf16": True},
    "bf16 autocast, PEFT's linears": {"bf16": True, "fused_lora": False},
    "sft": {"loss_type": "sft", "checkpointing": "every_2"},
    "second roots": {"loss_type": "mdpo"},
}


def settings(folder, **options):
    config = BPOConfig(output_dir=str(folder), use_cpu=True, max_length=2048, **({"bf16": False} | options))
    lora = LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM")
    return Run(config, lora, torch.float32, None, ON_CPU)


def real_trainer(run):
    model = make_llava(image_size=SIZE, patch_size=PATCH, vocab_size=VOCAB, **TEXT)
    trainer = BPOTrainer(
        model,
        args=run.config,
        train_dataset=Dataset.from_list(make_pairs(1)),
        processing_class=make_processor(SIZE, PATCH),
        peft_config=run.lora,
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    return trainer


def peak_of(run_step):
    """Most bytes of the CPU's allocator that were taken and not given back since the beginning."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run_step()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def storages(tensors):
    found = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(found.values())


@pytest.fixture(scope="module", params=CASES)
def both(request, tmp_path_factory):
    """(the counted step, the trainer of the real one, its sequences)"""
    run = settings(tmp_path_factory.mktemp("run"), **CASES[request.param])
    trainer = real_trainer(run)
    config = trainer.model.get_base_model().config
    sequences = packed_sequences(config, run, GROUPS, TOKENS)
    return count_step(config, run, sequences), trainer, sequences


def test_terms_that_last_are_what_the_tensors_hold(both):
    step, trainer, _ = both
    base = trainer.model.get_base_model()
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    tables = [base.get_input_embeddings().weight, base.get_output_embeddings().weight]
    decoder = [*base.get_decoder().parameters(), *base.get_decoder().buffers()]
    there = {id(tensor) for tensor in (*trained, *tables)}
    weights = [tensor for tensor in decoder if id(tensor) not in there]
    there |= set(map(id, weights))
    vision = [tensor for tensor in (*base.parameters(), *base.buffers()) if id(tensor) not in there]
    state = [x for values in trainer.optimizer.state.values() for x in values.values() if torch.is_tensor(x)]
    expected = {
        WEIGHTS: storages(weights),
        TABLES: storages(tables),
        VISION: 0 if trainer.args.cache_image_features else storages(vision),
        ADAPTER: storages(trained),
        GRADIENTS: storages([parameter.grad for parameter in trained]),
        OPTIMIZER: storages(state),
    }
    assert {name: step.loss.at_peak.get(name, 0) for name in expected} == expected


def test_the_peak_is_what_the_allocator_gives(both):
    step, trainer, sequences = both
    counted = sum(step.loss.at_peak.get(kind, 0) for kind in (KEPT, TRANSIENT, INSIDE))
    measured = peak_of(lambda: trainer.training_step(trainer.model_wrapped, {"sequences": sequences}))
    assert counted == pytest.approx(measured, rel=0.05)


def test_the_flops_are_those_of_the_real_step(both):
    step, trainer, sequences = both
    with FlopCounterMode(display=False) as counter:
        trainer.training_step(trainer.model_wrapped, {"sequences": sequences})
    found = {name: flops for name, flops in counter.get_flop_counts()["Global"].items() if flops}
    # PyTorch knows the products of PyTorch's operations; the head's are these.
    assert {name: step.loss.flops[name] for name in found} == found
    rows = sum(len(sequence.packing.targets) for sequence in sequences)
    live_reference = trainer.loss_config.needs_reference and not trainer.args.precompute_ref_log_probs
    head = step.loss.flops[torch.ops.bpo_fast.linear_token_logps]
    assert head == (6 if live_reference else 4) * rows * WIDTH * VOCAB


def test_what_is_kept_is_what_autograd_saves(tmp_path):
    run = settings(tmp_path, checkpointing="none")
    trainer = real_trainer(run)
    config = trainer.model.get_base_model().config
    (sequence,) = packed_sequences(config, run, GROUPS, TOKENS)
    step = count_step(config, run, [sequence])
    there = {x.untyped_storage()._cdata for x in (*trainer.model.parameters(), *trainer.model.buffers())}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in there:
            saved[storage._cdata] = storage
        return tensor

    trainer.model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = trainer.compute_loss(trainer.model_wrapped, {"sequence": sequence})
    del loss
    assert step.loss.at_peak[KEPT] == pytest.approx(sum(s.nbytes() for s in saved.values()), rel=0.05)


@pytest.mark.parametrize("mode", ["none", "every_2"])
def test_few_layers_stand_for_all_to_the_byte(tmp_path, monkeypatch, mode):
    run = settings(tmp_path, checkpointing=mode)
    config = make_llava(image_size=SIZE, patch_size=PATCH, vocab_size=VOCAB, **TEXT | {"num_hidden_layers": 8}).config
    sequences = packed_sequences(config, run, GROUPS[:1], TOKENS)
    quick = count_step(config, run, sequences)
    monkeypatch.setattr(step_module, "ALIKE", ())
    assert quick == count_step(config, run, sequences)
