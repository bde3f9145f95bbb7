"""What a model family needs beyond the common case: the names transformers' models give to their parts."""

# The module between vision tower and language model.
PROJECTORS = ("multi_modal_projector", "mm_projector", "connector", "embed_vision", "aligner", "merger")

# Fields of a text configuration by which logits are scaled; the head op knows no such scale.
LOGIT_SCALES = ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")

# A kind of layer in `layer_types` -> the field that bounds how far back its attention sees. A configuration without
# `layer_types` has layers of the first kind where it has the field.
ATTENTION_REACHES = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}

# A kind of rotary position whose angles change beyond a length -> the field that holds it. The longest sequence of a
# row would change the angles of all.
ROTARY_REACHES = {"dynamic": "max_position_embeddings", "longrope": "original_max_position_embeddings"}

# A model type -> its processor's number for the kind of an answer's tokens, where it is not that of a prompt's text.
ANSWER_TYPES = {"paligemma": 1}
