"""What a model family needs beyond the common case: the names transformers' models give to their parts."""

# The module between vision tower and language model.
PROJECTORS = ("multi_modal_projector", "mm_projector", "connector", "embed_vision", "aligner")

# The module that turns pixels into features.
VISION_MODULES = ("vision_tower", "vision_model")

# Fields of a text configuration by which logits are scaled; the head op knows no such scale.
LOGIT_SCALES = ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")
