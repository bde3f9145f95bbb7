"""The loss slot of a LLaVA-style trainer, filled by `bpo_fast.dpo_loss`.

    python examples/llava_trainer.py

LLaVA's codebase, and preference trainers grown from it, subclass transformers' Trainer: a batch holds chosen and
rejected rows, image features are spliced in at IMAGE_TOKEN_INDEX, the model gives logits, the reference is the model
with its adapter disabled. Only `preference_loss` is ours. Model and pairs are random and tiny.
"""

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText, LlavaConfig, Trainer, TrainingArguments

from bpo_fast import dpo_loss

IGNORE_INDEX, IMAGE_TOKEN_INDEX = -100, -200


def splice(model, input_ids, labels, attention_mask, images):
    """Embeddings, labels and mask in which the one image token of each row has become the rows of its features."""
    features = torch.stack(list(model.get_image_features(images, return_dict=True).pooler_output))
    embeds, rows = model.get_input_embeddings()(input_ids.clamp(min=0)), []
    for number, place in enumerate((input_ids == IMAGE_TOKEN_INDEX).long().argmax(1).tolist()):
        ignored = labels.new_full((features.shape[1],), IGNORE_INDEX)
        parts = ((embeds, features[number]), (labels, ignored), (attention_mask, torch.ones_like(ignored)))
        rows.append([torch.cat([x[number, :place], image, x[number, place + 1 :]]) for x, image in parts])
    return map(torch.stack, zip(*rows, strict=True))


class LlavaDPOTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        unwrapped = self.accelerator.unwrap_model(model)
        embeds, labels, mask = splice(unwrapped.get_base_model(), **inputs)
        policy_logits = model(inputs_embeds=embeds, attention_mask=mask).logits
        with torch.no_grad(), unwrapped.disable_adapter():
            ref_logits = model(inputs_embeds=embeds, attention_mask=mask).logits
        return self.preference_loss(policy_logits, ref_logits, labels)

    def preference_loss(self, policy_logits, ref_logits, labels):
        """The slot: mean loss of the pairs, from logits [2B, T, V] and labels [2B, T], chosen rows first."""
        return dpo_loss(policy_logits, labels, ref_logits=ref_logits, beta=0.1).loss


def collate(pairs):
    """Chosen rows, then rejected rows, padded at the right; prompts are ignored by the loss."""
    rows = [(pair["prompt"], pair[side], pair["image"]) for side in ("chosen", "rejected") for pair in pairs]
    ids = [torch.cat([prompt, response]) for prompt, response, _ in rows]
    labels = [torch.cat([torch.full_like(prompt, IGNORE_INDEX), response]) for prompt, response, _ in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "images": torch.stack([image for _, _, image in rows]),
    }


def make_model():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **sizes}
    text = {"model_type": "llama", "vocab_size": 64, **sizes}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=63)
    model = AutoModelForImageTextToText.from_config(config)
    return get_peft_model(model, LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|v_proj|down_proj)"))


def train(output_dir, trainer_class=LlavaDPOTrainer, steps=12):
    """Train on random pairs, and return the loss of each step."""
    torch.manual_seed(0)
    prompt = torch.tensor([1, IMAGE_TOKEN_INDEX, 5, 6])
    pairs = [
        {side: torch.randint(3, 63, (length,)) for side, length in (("chosen", 6), ("rejected", 3 + n))}
        | {"prompt": prompt, "image": torch.randn(3, 16, 16)}
        for n in range(4)
    ]
    arguments = TrainingArguments(
        output_dir, max_steps=steps, logging_steps=1, learning_rate=1e-2, per_device_train_batch_size=4,
        remove_unused_columns=False, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = trainer_class(make_model(), arguments, data_collator=collate, train_dataset=pairs)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print([round(loss, 4) for loss in train(folder)])
