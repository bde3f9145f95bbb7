"""DPO in a plain PyTorch loop: `bpo_fast.dpo_loss` on the logits of a causal language model.

    python examples/plain_loop.py

The model is a random one of a few thousand parameters and the pairs are random tokens, so that the script runs
anywhere in seconds; with a checkpoint and tokenized pairs in their place nothing below the two makers changes.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bpo_fast import dpo_loss


def make_model():
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


def make_batch(num_pairs=8, prompt_length=5, length=12):
    """Token ids [2B, T], the chosen rows first, and labels that ignore the prompt."""
    prompt = torch.randint(3, 64, (num_pairs, prompt_length)).repeat(2, 1)
    input_ids = torch.cat([prompt, torch.randint(3, 64, (2 * num_pairs, length - prompt_length))], 1)
    labels = input_ids.clone()
    labels[:, :prompt_length] = -100
    return input_ids, labels


def train(steps=30, beta=0.1, learning_rate=2e-3, seed=0):
    """Train, and return the metrics of each step."""
    torch.manual_seed(seed)
    model = make_model()
    input_ids, labels = make_batch()
    with torch.no_grad():
        # The reference is the model as it starts. Its sequence log-probs are all that the loss needs of it.
        start = dpo_loss(model(input_ids=input_ids).logits, labels)
    ref_logps = torch.cat([start.chosen_logps, start.rejected_logps])
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    history = []
    for _ in range(steps):
        output = dpo_loss(model(input_ids=input_ids).logits, labels, ref_logps=ref_logps, beta=beta)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append({"loss": output.loss.item(), **output.metrics()})
    return history


if __name__ == "__main__":
    for step, metrics in enumerate(train()):
        if step % 5 == 0:
            print(step, {name: round(value, 4) for name, value in metrics.items()})
