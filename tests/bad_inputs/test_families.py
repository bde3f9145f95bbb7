"""Models that packed sequences cannot train: a sentence with their names, before anything is trained."""

from bad_input import Bad, check, table
from tiny_families import REFUSED, llava


def put(make):
    def prepare(world):
        model, processor = make()
        model.save_pretrained(world / "model")
        processor.save_pretrained(world / "model")

    return prepare


@table(
    Bad(
        "a decoder that drops the packing",
        put(REFUSED["LLaVA over StableLM"][0]),
        "train",
        "StableLmModel, whose attention was called 2 times without the packing",
        left=None,
    ),
    Bad(
        "a decoder with layers of convolutions",
        put(REFUSED["LLaVA over Lfm2"][0]),
        "train --lora_target_modules q_proj",
        "Lfm2Model, which called attention 1 times in 2 layers",
        left=None,
    ),
    Bad(
        "a decoder with attention sinks",
        put(REFUSED["LLaVA over GPT-OSS"][0]),
        "train --lora_target_modules q_proj",
        "GptOssModel, whose attention takes s_aux, which packed attention does not compute",
        left=None,
    ),
    Bad(
        "images whose tokens see each other both ways",
        put(REFUSED["PaliGemma"][0]),
        "train",
        "PaliGemmaForConditionalGeneration over GemmaModel, whose log-probs on packed sequences differ",
        left=None,
    ),
    Bad(
        "a state beside attention",
        put(REFUSED["LLaVA over FalconH1"][0]),
        "train --lora_target_modules q_proj",
        "over FalconH1Model, whose layers have convolutions over tokens, and whose log-probs on packed",
        left=None,
    ),
    Bad(
        "a window shorter than the prompt",
        put(lambda: llava("MistralConfig", sliding_window=6)),
        "train",
        "sliding_window: found 6, expected None or at least the",
        left=None,
    ),
)
def test_bad_models(bad, world, capsys):
    check(bad, world, capsys)
