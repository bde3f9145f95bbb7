"""A subclass of TRL's DPOTrainer whose loss is `bpo_fast.linear_dpo_loss`: from hidden states, without logits.

    python examples/trl_subclass.py

Runs TRL's own trainer and the subclass on the same pairs and prints both loss histories, which agree. The model and
the words are random and tiny, so that the script runs anywhere in seconds.
"""

import random
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from bpo_fast import linear_dpo_loss

WORDS = [f"w{number}" for number in range(60)]


class LinearDPOTrainer(DPOTrainer):
    """Takes the place of DPOTrainer for a LoRA model: the reference is the model with its adapter disabled."""

    def _compute_loss(self, model, inputs, return_outputs=False):
        base = self.accelerator.unwrap_model(model)
        decoder, head = base.get_base_model().get_decoder(), base.get_output_embeddings()
        tokens = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
        with torch.no_grad(), base.disable_adapter():
            ref_hidden = decoder(**tokens).last_hidden_state
        output = linear_dpo_loss(
            decoder(**tokens).last_hidden_state,
            head.weight,
            inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100),
            ref_hidden=ref_hidden,
            beta=self.beta,
            loss_type=self.loss_types,
            loss_weights=self.loss_weights,
        )
        metrics = self._metrics["train" if model.training else "eval"]
        for name, value in output.metrics().items():
            metrics[name].append(value)
        return (output.loss, output) if return_outputs else output.loss


def make_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


def make_tokenizer():
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def make_pairs(count=16):
    rng = random.Random(0)
    columns = ("prompt", "chosen", "rejected")
    return Dataset.from_list(
        [{name: " ".join(rng.choices(WORDS, k=rng.randint(2, 9))) + " " for name in columns} for _ in range(count)]
    )


def train(trainer_class, output_dir, steps=8):
    """Train, and return the log of each step."""
    arguments = DPOConfig(
        output_dir=output_dir, max_steps=steps, logging_steps=1, learning_rate=1e-2, per_device_train_batch_size=4,
        save_strategy="no", report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    trainer = trainer_class(
        make_model(), args=arguments, train_dataset=make_pairs(), processing_class=make_tokenizer(), peft_config=lora
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        stock, ours = train(DPOTrainer, folder), train(LinearDPOTrainer, folder)
    for theirs, entry in zip(stock, ours, strict=True):
        print(f"step {entry['step']}: TRL {theirs['loss']:.6f}, linear_dpo_loss {entry['loss']:.6f}")
