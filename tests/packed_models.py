"""Tiny LLaVAs and groups of random tokens, scored packed, padded and one by one."""

import random

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import VOCAB_SIZE
from torch import nn

from bpo_fast.models.lora import restrict_to_decoder
from bpo_fast.models.packed_forward import enable_packed_forward, image_features, sum_branches
from bpo_fast.models.packing import Group, pack

IMAGE = 4  # id of the image token of the tiny models


def random_groups(seed, num_branches, count=3):
    rng = random.Random(seed)

    def tokens(most):
        return [rng.randrange(5, VOCAB_SIZE) for _ in range(rng.randint(1, most))]

    return [
        Group([1, IMAGE, IMAGE, IMAGE, IMAGE, *tokens(6)], [tokens(9) for _ in range(num_branches)])
        for _ in range(count)
    ]


def with_lora(model, seed=0):
    model = get_peft_model(model, restrict_to_decoder(LoraConfig(r=4), model))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)  # zero as it starts, which would hide the gradients of A
    enable_packed_forward(model.get_base_model())
    return model


def packed_logps(model, groups, pixel_values):
    packing = pack(groups)
    features = image_features(model, {"pixel_values": pixel_values})
    rows = torch.nonzero(packing.input_ids == IMAGE).flatten()
    return sum_branches(model(packing=packing, image_features=features, image_rows=rows).token_logps, packing)


def padded_logps(model, groups, pixel_values, side="right"):
    """Every branch a padded sequence of its own with its own image, by the model's own forward and full logits."""
    sequences = [(group.prefix, branch) for group in groups for branch in group.branches]
    longest = max(len(p) + len(b) for p, b in sequences)
    ids, labels, mask = (torch.full((len(sequences), longest), fill) for fill in (0, -100, 0))
    for n, (prefix, branch) in enumerate(sequences):
        length = len(prefix) + len(branch)
        span = slice(0, length) if side == "right" else slice(longest - length, longest)
        ids[n, span] = torch.tensor([*prefix, *branch])
        labels[n, span] = torch.tensor([-100] * len(prefix) + list(branch))
        mask[n, span] = 1
    pixels = torch.cat([pixel_values[g : g + 1] for g, group in enumerate(groups) for _ in group.branches])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, pixel_values=pixels).logits
    logps = logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    return logps.gather(2, targets.clamp(min=0)[..., None])[..., 0].masked_fill(targets == -100, 0).sum(1)


def apart_logps(model, groups, pixel_values):
    """Every branch alone, one after the other."""
    alone = [(Group(g.prefix, [b]), pixel_values[n : n + 1]) for n, g in enumerate(groups) for b in g.branches]
    return torch.cat([padded_logps(model, [group], pixels) for group, pixels in alone])


def gradients(model, logps):
    weights = torch.linspace(-1, 1, len(logps)) + 0.1
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad((weights * logps).sum(), parameters)])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()
