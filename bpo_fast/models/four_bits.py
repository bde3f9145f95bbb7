"""Linears of 4 bits on a CPU, kept in the layout that a backward pass goes through."""

from torch import nn


def keep_training_layout(model: nn.Module) -> None:
    """Have bitsandbytes leave its 4-bit linears as they were loaded.

    On processors with AVX512-BF16 it packs such a linear anew when that is first called for inference, be it by the
    start check. What then multiplies by it has no gradient, and a training would go on with wrong ones.

    Args:
        model: with or without linears of 4 bits.

    Raises:
        ValueError: one is packed already. The way back would round its scales.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"model: found {name} packed by bitsandbytes for inference on this CPU, expected weights as they were "
                "loaded, through which there are gradients; load the model again, and train before it answers."
            )
        module.support_avx512bf16_for_cpu = False
