"""The checks of arguments that ops, losses and noise share.

Each raises TypeError for a wrong type or dtype and ValueError for a wrong shape, device or value, with one sentence of
the form `<name>: found <what>, expected <what>; <remedy>.`
"""

from collections.abc import Iterable, Sequence
from numbers import Integral

import torch
from torch import Tensor

IGNORE_INDEX = -100
INDEX_DTYPES = (torch.int64, torch.int32)
INTEGER_DTYPES = (*INDEX_DTYPES, torch.int16, torch.uint8, torch.int8)


def describe(value: object) -> str:
    """`float32 [2, 7]` of a tensor, the name of its type of anything else."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{_dtype_name(value.dtype)} {list(value.shape)}"


def is_int(value: object) -> bool:
    """Whether `value` is a whole number, a symbolic one of torch.compile included; a bool is not."""
    return isinstance(value, (Integral, torch.SymInt)) and not isinstance(value, bool)


def check_tensor(name: str, value: object, shape: Sequence[int | str], dtypes: Sequence[torch.dtype] | None = None):
    """Raise unless `value` is a tensor of `shape` and of one of `dtypes`, or of any floating-point dtype.

    A letter in `shape` stands for any number, "..." for any number of dimensions.

    >>> check_tensor("policy_logits", torch.zeros(3, 4), ("2B", "T", "V"))
    Traceback (most recent call last):
    ValueError: policy_logits: found float32 [3, 4], expected [2B, T, V].
    """
    fits = isinstance(value, Tensor) and (value.is_floating_point() if dtypes is None else value.dtype in dtypes)
    _check_dtype_and_shapes(name, value, fits, dtypes, (shape,))


def check_indices(
    name: str,
    value: object,
    *shapes: Sequence[int | str],
    dtypes: Sequence[torch.dtype] = INDEX_DTYPES,
    otherwise: str | None = None,
):
    """Raise unless `value` is an integer tensor of one of `shapes`, written as for `check_tensor`.

    `otherwise` says what else the argument may be; the caller has looked for that already.

    >>> check_indices("step", 0.5, (3,), otherwise="an int")
    Traceback (most recent call last):
    TypeError: step: found float, expected an int or a tensor [3] of int64 or int32.
    """
    fits = isinstance(value, Tensor) and value.dtype in dtypes
    _check_dtype_and_shapes(name, value, fits, dtypes, shapes, otherwise)


def check_device(name: str, value: Tensor, other_name: str, other: Tensor):
    """Raise unless `value` is on the device of `other`."""
    if value.device != other.device:
        raise ValueError(
            f"{name}: found on {value.device}, expected on {other.device} like {other_name}; move one of them."
        )


def check_same(name: str, value: Tensor, other_name: str, other: Tensor):
    """Raise unless `value` is on the device of `other` and, where both hold floats, has its dtype."""
    check_device(name, value, other_name, other)
    if value.is_floating_point() and other.is_floating_point() and value.dtype != other.dtype:
        found, expected = _dtype_name(value.dtype), _dtype_name(other.dtype)
        raise TypeError(f"{name}: found {found}, expected {expected} like {other_name}; cast one of them.")


def check_transform(logit_softcap: float | None, temperature: float):
    """Raise for a cap or a temperature that is not positive."""
    if logit_softcap is not None and not logit_softcap > 0:
        raise ValueError(f"logit_softcap: found {logit_softcap}, expected a positive number or None.")
    if not temperature > 0:
        raise ValueError(f"temperature: found {temperature}, expected a positive number.")


def check_target_range(targets: Tensor, vocab_size: int):
    """Raise unless every target is in the vocabulary or -100.

    Looks at the data, so it runs inside the ops, where torch.compile does not trace. Not called before a kernel: the
    answer would have to be waited for, and the kernels give NaN for such a row and its gradient.
    """
    wrong = (targets != IGNORE_INDEX) & ((targets < 0) | (targets >= vocab_size))
    if wrong.any():
        raise ValueError(
            f"targets (labels): found {targets[wrong][0].item()}, expected 0 to {vocab_size - 1}, or {IGNORE_INDEX} "
            "where ignored; check that the tokenizer belongs to the model."
        )


def check_ranges(ranges: Iterable[tuple[str, Tensor | None, int, int, str]]):
    """Raise for indices out of range; entries: (name, non-empty tensor or None, lowest, one past the highest, what).

    `what` says what the numbers in range are. Looks at the data: tensors on a GPU are waited for, together once.
    """
    ranges = [entry for entry in ranges if entry[1] is not None]
    bounds = {}
    for device in {tensor.device for _, tensor, *_ in ranges}:
        here = [(name, tensor) for name, tensor, *_ in ranges if tensor.device == device]
        pairs = torch.stack([torch.stack(tensor.aminmax()).long() for _, tensor in here]).tolist()
        bounds |= {name: pair for (name, _), pair in zip(here, pairs, strict=True)}
    for name, _, lowest, past, what in ranges:
        low, high = bounds[name]
        if low < lowest or high >= past:
            raise ValueError(
                f"{name}: found {low if low < lowest else high}, expected {lowest} to {past - 1}, {what}."
            )


def _dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def _in_words(options):
    *most, last = options
    return f"{', '.join(most)} or {last}" if most else last


def _check_dtype_and_shapes(name, value, dtype_fits, dtypes, shapes, otherwise=None):
    # Sentences are made where one is raised: under torch.compile the words of a shape would pin it.
    if dtype_fits:
        found = value.shape
        for shape in shapes:
            if _shape_fits(found, shape):
                return
    expected = _in_words([f"[{', '.join(map(str, shape))}]" for shape in shapes])
    if not dtype_fits:
        kind = "a floating-point dtype" if dtypes is None else _in_words(list(map(_dtype_name, dtypes)))
        expected = f"a tensor {expected} of {kind}"
    error = ValueError if dtype_fits else TypeError
    raise error(f"{name}: found {describe(value)}, expected {f'{otherwise} or ' if otherwise else ''}{expected}.")


def _shape_fits(found, shape):
    extra, shift = len(found) - len(shape), 0
    if extra and (extra < -1 or not any(isinstance(want, str) and want == "..." for want in shape)):
        return False
    for place, want in enumerate(shape):
        if not isinstance(want, str):
            if found[place + shift] != want:
                return False
        elif want == "...":
            shift = extra
    return True
