"""Names that help texts list, so that help imports no torch. A test holds them to the tables that they come from."""

NOISE_TARGETS = ("features", "pixels", "projected")  # bpo_fast.models.weaken.TARGETS
SCHEDULES = ("sigmoid", "linear", "cosine")  # bpo_fast.models.weaken.SCHEDULES
# bpo_fast.models.lora.LORA_TARGET_MODULES
LORA_TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PRESETS = ("llava-1.5-7b", "llava-1.5-13b")  # bpo_fast.plan.shapes.PRESETS
# bpo_fast.plan.cards.CARDS
CARDS = (
    *("a40", "a6000", "a100-40", "a100-80", "l4", "l40s", "rtx6000-ada", "h100", "h200", "b200"),
    *("rtx3090", "rtx4080", "rtx4090", "rtx5090"),
)
# bpo_fast.bootstrap.kinds.KINDS
KINDS = ("image_weakened", "error_injected", "self_generated", "m3po", "sft")
EXPORT_FORMS = ("llava", "rlaif", "llamafactory")  # bpo_fast.data.export.FORMS
