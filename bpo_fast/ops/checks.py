"""Argument checks of the ops and losses: one sentence that names the argument, what came and what was wanted."""

import torch

IGNORE_INDEX = -100


def describe(tensor):
    """`float32 [2, 7]`, or the type's name of what is no tensor."""
    if not isinstance(tensor, torch.Tensor):
        return type(tensor).__name__
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def check_tensor(name, value, shape):
    """Raise unless `value` is a floating-point tensor of `shape`: a tuple of numbers, a letter for any number."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {describe(value)}.")
    if value.ndim != len(shape) or any(
        isinstance(want, int) and have != want for have, want in zip(value.shape, shape, strict=True)
    ):
        raise ValueError(f"{name} must have shape [{', '.join(map(str, shape))}], got {list(value.shape)}.")


def check_indices(name, value, shape):
    """Raise unless `value` holds int64 or int32 indices in `shape`, a tuple of numbers."""
    if not isinstance(value, torch.Tensor) or value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be an int64 or int32 tensor, got {describe(value)}.")
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(value.shape)}.")


def check_same(name, value, other_name, other):
    """Raise unless `value` is on the device of `other` and, where both hold floats, has its dtype."""
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device} but {other_name} is on {other.device}; move one of them.")
    if value.is_floating_point() and other.is_floating_point() and value.dtype != other.dtype:
        raise TypeError(
            f"{name} is {str(value.dtype).removeprefix('torch.')} but {other_name} is "
            f"{str(other.dtype).removeprefix('torch.')}; cast one of them."
        )


def check_target_range(targets, vocab_size):
    """Raise unless every target is in the vocabulary or -100.

    Looks at the data, so it runs inside the ops, where torch.compile does not trace. Targets on a CUDA device are not
    looked at: the answer would have to be waited for. The kernels give NaN for such a row.
    """
    if targets.is_cuda:
        return
    wrong = (targets != IGNORE_INDEX) & ((targets < 0) | (targets >= vocab_size))
    if wrong.any():
        value = targets[wrong][0].item()
        raise ValueError(
            f"labels must be in [0, {vocab_size}) or {IGNORE_INDEX} (ignored), found {value}; "
            "check that the tokenizer belongs to the model."
        )
