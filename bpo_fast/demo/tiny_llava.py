"""A tiny real LLaVA with a language prior: built and trained here, shipped in `checkpoint/`.

    python -m bpo_fast.demo.tiny_llava --output_dir checkpoint

It trains on one thread, so that the bits do not depend on the number of cores, and records what else they depend on;
`python tests/checkpoint.py` makes the shipped one again and compares.

It is a `LlavaForConditionalGeneration` with its `LlavaProcessor`, in the layout of llava-hf/llava-1.5-7b-hf. The
vision tower learns to see an unbiased world (stage 1), the language model reads about a biased one (2), and both
answer questions about an unbiased world (3). Stage 4 goes on with images of a biased world that are hard to make out:
saying what is typical pays there, and becomes a habit that overrules images as clear as day. So the image features
hold the truth, but the model says what usually is there: preference training of the language model can put that right.

Beside their own task, stages 2 to 4 learn another, of text alone: to repeat an answer with one error put in, as
`bootstrap.error_injected` asks it of a model. All three, so that none unlearns it.
"""

import argparse
import os
import platform
import random
import shutil
from importlib.metadata import version
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    set_seed,
)

from bpo_fast.bootstrap.rewriting import read_template
from bpo_fast.demo import world, wrong_answers
from bpo_fast.models.prompt import encode, image_inputs, question, render
from bpo_fast.models.weaken import weaken
from bpo_fast.runs.files import write_json

CHECKPOINT = Path(__file__).with_name("checkpoint")
RECORD = "made_by.json"  # in a checkpoint: what decides its bits

PIXELS = 48  # the processor's size; a cell of the world is 16 pixels, four patches
PATCH = 8
FEATURE_SCALE = 0.5  # root mean square of the features: the last steps of the noise schedule hide an image
CORPUS_BIAS = 0.99
HABIT_STEPS = (700, 999)  # noise on the images of stage 4
REWRITING_BATCH = 32  # answers to rewrite in each step of stages 2 to 4
NO_OBJECT = len(world.COLORS), len(world.SHAPES)  # color and shape label of an empty patch

# LLaVA-1.5's "USER: <image>\nquestion ASSISTANT: answer", closed by </s> as Vicuna was trained.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% set texts = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ 'ASSISTANT:' }}{% generation %}{{ ' ' + texts + eos_token }}{% endgeneration %}"
    "{% else %}"
    "{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] if content['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{{ texts + ' ' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def build_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the world's sentences: a word of the world is one token, any other text still encodes."""
    rng = random.Random(seed)
    samples = [world.sample_conversation(rng, bias=0.0) for _ in range(4000)]
    texts = [f"USER: \n{question} ASSISTANT: {answer}" for _, question, answer in samples]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special_tokens = [*specials.values(), "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **specials,
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=512,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_processor(seed: int = 0) -> LlavaProcessor:
    side = {"height": PIXELS, "width": PIXELS}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size=side),
        tokenizer=build_tokenizer(seed),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which "default" then drops
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The untrained model, float32."""
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 4}
    token_ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vision_config = CLIPVisionConfig(
        image_size=PIXELS, patch_size=PATCH, num_hidden_layers=3, projection_dim=96, **sizes
    )
    text_config = LlamaConfig(
        vocab_size=len(tokenizer), num_hidden_layers=4, max_position_embeddings=512, **sizes, **token_ids
    )
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(PIXELS // PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config)


def _fit(name, parameters, loss_of_batch, *, steps, learning_rate):
    """AdamW with a warm-up of 5 % and a linear decay over `steps` calls of `loss_of_batch()`."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.05 * steps), (steps - step) / steps)
    )
    progress = tqdm(range(steps), desc=name)
    for _ in progress:
        loss = loss_of_batch()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")


def patch_labels(scene: world.Scene) -> torch.Tensor:
    """Color and shape index of the object that owns each patch: int64 [patches, 2], row by row."""
    labels = torch.tensor(NO_OBJECT).repeat(world.GRID, world.GRID, 1)
    for (column, row), item in world.cells(scene).items():
        labels[row, column] = torch.tensor([list(world.COLORS).index(item.color), world.SHAPES.index(item.shape)])
    patches_of_cell = PIXELS // PATCH // world.GRID
    return labels.repeat_interleave(patches_of_cell, 0).repeat_interleave(patches_of_cell, 1).flatten(0, 1)


def train_vision(model, processor, *, steps, batch_size, learning_rate, seed):
    """Stage 1: every patch tells its object's color and shape and the ground, through one linear layer."""
    rng = random.Random(seed)
    tower = model.model.vision_tower
    num_colors, num_shapes = len(world.COLORS) + 1, len(world.SHAPES) + 1
    head = torch.nn.Linear(tower.config.hidden_size, num_colors + num_shapes + len(world.GROUNDS))

    def loss_of_batch():
        scenes = [world.sample_scene(rng, bias=0.0) for _ in range(batch_size)]
        pixels = processor.image_processor([world.draw(scene) for scene in scenes], return_tensors="pt")
        features = tower(pixels["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        color, shape, ground = head(features).split([num_colors, num_shapes, len(world.GROUNDS)], -1)
        labels = torch.stack([patch_labels(scene) for scene in scenes])
        grounds = torch.tensor([list(world.GROUNDS).index(scene.ground) for scene in scenes])
        scale = (features.pow(2).mean(-1) / FEATURE_SCALE**2 - 1).pow(2).mean()
        return (
            cross_entropy(color.flatten(0, 1), labels[..., 0].flatten())
            + cross_entropy(shape.flatten(0, 1), labels[..., 1].flatten())
            + cross_entropy(ground.flatten(0, 1), grounds.repeat_interleave(labels.shape[1]))
            + 0.1 * scale
        )

    parameters = [*tower.parameters(), *head.parameters()]
    _fit("1/4 vision tower", parameters, loss_of_batch, steps=steps, learning_rate=learning_rate)


def rewriting(model, processor, *, seed):
    """What stages 2 to 4 learn beside their own task: the loss of the next batch of answers to put an error into."""
    rng = random.Random(seed)
    template = read_template(wrong_answers.TEMPLATE)
    eos = processor.tokenizer.eos_token

    def loss_of_batch():
        rows = [wrong_answers.sample_rewriting(rng) for _ in range(REWRITING_BATCH)]
        prompts = [render(processor, template.ask(*row[:3]), num_images=0)[0] for row in rows]
        return model(**collate(processor, None, prompts, [f" {row[3]}{eos}" for row in rows])).loss

    return loss_of_batch


def train_language(model, processor, loss_of_rewriting, *, steps, batch_size, learning_rate, seed):
    """Stage 2: next-token prediction on sentences about the biased world."""
    rng = random.Random(seed)
    tokenizer = processor.tokenizer

    def loss_of_batch():
        texts = world.text_corpus(batch_size, bias=CORPUS_BIAS, seed=rng.getrandbits(32))
        batch = tokenizer([text + tokenizer.eos_token for text in texts], padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        own = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        return own + loss_of_rewriting()

    parameters = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    _fit("2/4 language model", parameters, loss_of_batch, steps=steps, learning_rate=learning_rate)


def collate(processor, images, prompts, responses) -> dict[str, torch.Tensor]:
    """Model inputs of a batch, prompts padded on the left and responses on the right, and labels on the responses.

    Args:
        processor: of a LLaVA.
        images, prompts: one image a rendered prompt, which has one `<image>` and its BOS; None for prompts of text.
        responses: texts that follow, as the tokenizer should see them: with their leading space.
    """
    prompt = encode(processor, prompts, [[]] * len(prompts) if images is None else [[image] for image in images])
    response = processor.tokenizer(
        list(responses), padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt"
    )
    labels = response["input_ids"].masked_fill(response["attention_mask"] == 0, -100)
    return {
        **image_inputs(prompt),
        "input_ids": torch.cat([prompt["input_ids"], response["input_ids"]], 1),
        "attention_mask": torch.cat([prompt["attention_mask"], response["attention_mask"]], 1),
        "labels": torch.cat([torch.full_like(prompt["input_ids"], -100), labels], 1),
    }


def answer_questions(
    name, model, processor, loss_of_rewriting, *, bias, noise_steps, steps, batch_size, learning_rate, seed
):
    """Stages 3 and 4: projector and language model answer questions about images.

    Args:
        name: label of the progress bar.
        loss_of_rewriting: of `rewriting`.
        bias: of the world that the images are of.
        noise_steps: bounds of the noise step that is drawn for each image, or None for clear images.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    eos = processor.tokenizer.eos_token
    model.model.vision_tower.requires_grad_(False)

    def loss_of_batch():
        rows = [world.sample_conversation(rng, bias) for _ in range(batch_size)]
        images = [world.draw(scene) for scene, _, _ in rows]
        prompts = [render(processor, question(text))[0] for _, text, _ in rows]
        batch = collate(processor, images, prompts, [f" {answer}{eos}" for _, _, answer in rows])
        step = None if noise_steps is None else torch.randint(*noise_steps, (batch_size,), generator=generator)
        with weaken(model, step, seed=rng.getrandbits(32)):
            own = model(**batch).loss
        return own + loss_of_rewriting()

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _fit(name, parameters, loss_of_batch, steps=steps, learning_rate=learning_rate)
    model.model.vision_tower.requires_grad_(True)


def train(output_dir: str | os.PathLike, *, seed: int = 0) -> None:
    """Bring up the tiny model and write model, processor and `RECORD` to `output_dir`, on one thread."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order on any number of cores
    try:
        model, processor = _train_stages(seed)
    finally:
        torch.set_num_threads(num_threads)
    output_dir = Path(output_dir)
    partial = output_dir.with_name(output_dir.name + ".tmp")
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    write_json(partial / RECORD, _maker(seed))
    if output_dir.exists():
        shutil.rmtree(output_dir)
    os.replace(partial, output_dir)


def _train_stages(seed):
    set_seed(seed)
    processor = build_processor(seed)
    model = build_model(processor.tokenizer)
    train_vision(model, processor, steps=700, batch_size=64, learning_rate=2e-3, seed=seed + 1)
    loss_of_rewriting = rewriting(model, processor, seed=seed + 5)
    train_language(model, processor, loss_of_rewriting, steps=900, batch_size=96, learning_rate=1e-3, seed=seed + 2)
    stages = (
        ("3/4 seeing", {"bias": 0.0, "noise_steps": None, "steps": 600, "learning_rate": 2e-3}),
        ("4/4 habit", {"bias": CORPUS_BIAS, "noise_steps": HABIT_STEPS, "steps": 80, "learning_rate": 1e-3}),
    )
    for number, (name, options) in enumerate(stages, start=3):
        answer_questions(name, model, processor, loss_of_rewriting, batch_size=64, seed=seed + number, **options)
    return model, processor


def _maker(seed):
    """What decides the bits of a training on one thread: the seed, the libraries that compute, the processor."""
    libraries = ("torch", "transformers", "tokenizers", "numpy", "pillow")
    return {"seed": seed, "cpu": _cpu(), **{name: version(name) for name in libraries}}


def _cpu():
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output_dir", default=str(CHECKPOINT))
    parser.add_argument("--seed", type=int, default=0)
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
