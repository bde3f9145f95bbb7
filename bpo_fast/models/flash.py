"""Which variable-length FlashAttention packed attention calls on a device, and that call.

All of them take queries at the end of their keys (causal, aligned at the bottom right) and fewer heads of keys than of
queries. A package is taken when its function has been imported: one built for another torch is found by name and fails
then, and FlashAttention 4's package bears the name of FlashAttention 2's without its functions. What is passed over is
part of the reason that `bpo-fast doctor` shows.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor

# Back end -> the module that has its flash_attn_varlen_func, and what it is called.
_PACKAGES = {"flash_attn_3": ("flash_attn_interface", "FlashAttention 3"), "flash_attn": ("flash_attn", "flash-attn")}
_MOST_HEAD_DIM = 256
# FlashAttention 3 pads heads of more to 256, of which it has no deterministic backward pass.
_MOST_DETERMINISTIC_3 = 192


@functools.cache
def flash_function(backend: str) -> tuple[Callable[..., Tensor] | None, str]:
    """The variable-length function of "flash_attn_3" or "flash_attn", and a phrase of what is there or why it is not.

    Example:
        >>> flash_function("flash_attn")[1].startswith("flash-attn ")
        True
    """
    module, name = _PACKAGES[backend]
    try:
        function = importlib.import_module(module).flash_attn_varlen_func
        # Releases before 2.4.1 have no such argument, and the first ones align the mask at the top left.
        if "deterministic" in inspect.signature(function).parameters:
            return function, f"{name} is installed"
        return None, f"{name} is older than 2.4.1"
    except ModuleNotFoundError as error:
        if error.name == module:
            return None, f"{name} is not installed"
        return None, f"{name} does not import ({_first_line(error)})"
    except AttributeError:
        return None, f"{name} has no flash_attn_varlen_func, as FlashAttention 4's package has none"
    except Exception as error:  # an undefined symbol is an ImportError here and an OSError there
        return None, f"{name} does not import ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"


@functools.cache
def choose_backend(
    device: str | torch.device, dtype: torch.dtype = torch.bfloat16, head_dim: int = 128, deterministic: bool = False
) -> tuple[str, str]:
    """The back end that packed attention uses on a device, and why.

    Args:
        device: "cuda", "cuda:1", "cpu", ...
        dtype: of queries, keys and values.
        head_dim: numbers of one head.
        deterministic: whether gradients are to be added up in a fixed order.

    Returns:
        (name, reason), name one of "flash_attn_3", "flash_attn", "torch_varlen", "sdpa".

    Example:
        >>> choose_backend("cpu")[0]
        'sdpa'
    """
    device = torch.device(device)
    if device.type != "cuda":
        return "sdpa", f"variable-length FlashAttention needs a CUDA device, and this one is '{device.type}'"
    if dtype not in (torch.float16, torch.bfloat16):
        return "sdpa", f"FlashAttention takes float16 and bfloat16 only, and the tensors are {dtype}"
    if head_dim > _MOST_HEAD_DIM or head_dim % 8:
        return (
            "sdpa",
            f"FlashAttention takes heads of 8, 16, ... {_MOST_HEAD_DIM} numbers, and these are of {head_dim}",
        )
    # Without a GPU, what one of the usual kind would get.
    capability = torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (8, 0)
    if capability < (8, 0):
        return (
            "sdpa",
            f"FlashAttention needs compute capability 8.0, and this GPU has {'.'.join(map(str, capability))}",
        )
    passed_over = []
    for backend in ("flash_attn_3", "flash_attn") if capability == (9, 0) else ("flash_attn",):
        function, found = flash_function(backend)
        if deterministic and backend == "flash_attn_3" and head_dim > _MOST_DETERMINISTIC_3:
            function, found = None, f"FlashAttention 3 is not deterministic with heads of {head_dim}"
        if function is not None:
            return backend, "; ".join([*passed_over, found])
        passed_over.append(found)
    if find_spec("torch.nn.attention.varlen") is None:
        return "sdpa", "; ".join([*passed_over, "torch.nn.attention.varlen is not there either; install torch>=2.11"])
    if torch.cuda.is_available() and not torch.backends.cuda.is_flash_attention_available():
        return "sdpa", "; ".join([*passed_over, "this torch was built without FlashAttention"])
    return "torch_varlen", "; ".join([*passed_over, "torch's own variable-length FlashAttention is there"])


def flash_attention(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: tuple[Tensor, Tensor, int, int],
    *,
    scaling: float | None,
    deterministic: bool,
) -> Tensor:
    """Causal attention of each segment, [N, heads, D], by one call.

    Args:
        backend: of `choose_backend`, "sdpa" aside.
        query: [N, heads, D].
        key, value: [M, kv_heads, D].
        bounds: cumulative lengths of queries and of keys, int32, and the longest of each.
        scaling: factor of the scores; None for 1 / sqrt(D).
        deterministic: add up the gradient of the queries in a fixed order, not by atomics.
    """
    if backend in _PACKAGES:
        function, _ = flash_function(backend)
        out = function(query, key, value, *bounds, softmax_scale=scaling, causal=True, deterministic=deterministic)
        return out[0] if isinstance(out, tuple) else out  # early releases of FlashAttention 3 give statistics too
    call = functools.partial(_torch_attention, bounds=bounds, scaling=scaling)
    asked = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    if deterministic and not asked and torch.is_grad_enabled():
        return _DeterministicBackward.apply(call, query, key, value)
    return call(query, key, value)


@functools.cache
def torch_varlen() -> tuple[Callable[..., Tensor], bool]:
    """torch's varlen_attn, causal as this release spells it, and whether it takes grouped heads."""
    from torch.nn.attention.varlen import varlen_attn

    parameters = inspect.signature(varlen_attn).parameters
    causal = {"is_causal": True} if "is_causal" in parameters else {"window_size": (-1, 0)}
    return functools.partial(varlen_attn, **causal), "enable_gqa" in parameters


def _torch_attention(query, key, value, *, bounds, scaling):
    function, takes_groups = torch_varlen()
    options, groups = {}, query.shape[1] // key.shape[1]
    if groups > 1 and takes_groups:
        options["enable_gqa"] = True
    elif groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return function(query, key, value, *bounds, scale=scaling, **options)


class _DeterministicBackward(torch.autograd.Function):
    """A call whose backward pass runs under torch's deterministic algorithms, the one way torch's attention is asked.

    Only this call's: for a whole step they would forbid more than they order. It is made again in the backward pass,
    since its own graph cannot be entered from there.
    """

    @staticmethod
    def forward(ctx, call, *tensors):
        ctx.call = call
        ctx.save_for_backward(*tensors)
        return call(*tensors)

    @staticmethod
    def backward(ctx, grad):
        tensors = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = ctx.call(*tensors)
        with _deterministic_algorithms():
            return None, *torch.autograd.grad(out, tensors, grad)


@contextmanager
def _deterministic_algorithms() -> Iterator[None]:
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
