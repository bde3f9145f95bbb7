"""Names that help texts list, so that help imports no torch. A test holds them to the tables that they come from."""

NOISE_TARGETS = ("features", "pixels", "projected")  # bpo_fast.models.weaken.TARGETS
SCHEDULES = ("sigmoid", "linear", "cosine")  # bpo_fast.models.weaken.SCHEDULES
# bpo_fast.models.lora.LORA_TARGET_MODULES
LORA_TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
