"""A model without its weights: every tensor in its true shape and dtype, and no memory behind it."""

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

BLOCK, NESTED_BLOCK = 64, 256  # values a scale of NF4, and scales a scale of those


def meta_model(config: PreTrainedConfig, dtype: torch.dtype, quantization: str | None) -> PreTrainedModel:
    """The model on the meta device.

    Args:
        config: of a vision-language model.
        dtype: of its weights, those that are not quantised.
        quantization: "nf4" holds the decoder's linears as `load_model` does, None does not.

    Raises:
        ImportError: "nf4" without bitsandbytes.
    """
    with torch.device("meta"), no_init_weights():
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
        if quantization == "nf4":
            _quantise(model.get_decoder(), dtype)
            model.is_loaded_in_4bit = True  # by which PEFT chooses its linear
    return model.eval()


def _quantise(decoder, dtype):
    try:
        import bitsandbytes
    except ImportError:
        raise ImportError(
            "quantization: found 'nf4' without bitsandbytes; pip install 'bitsandbytes>=0.48'."
        ) from None
    for name, linear in list(decoder.named_modules()):
        if type(linear) is nn.Linear:
            parent, _, leaf = name.rpartition(".")
            new = _nf4_linear(bitsandbytes, linear, dtype)
            setattr(decoder.get_submodule(parent) if parent else decoder, leaf, new)


def _nf4_linear(bitsandbytes, linear, dtype):
    out, width = linear.weight.shape
    new = bitsandbytes.nn.Linear4bit(
        width, out, bias=linear.bias is not None, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
    )
    scales = -(-out * width // BLOCK)
    state = bitsandbytes.functional.QuantState
    nested = state(
        absmax=torch.empty(-(-scales // NESTED_BLOCK)),
        code=torch.empty(256),
        blocksize=NESTED_BLOCK,
        dtype=torch.float32,
    )
    quantised = state(
        absmax=torch.empty(scales, dtype=torch.uint8),
        shape=torch.Size([out, width]),
        code=torch.empty(16),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.empty(()),
        state2=nested,
    )
    new.weight = bitsandbytes.nn.Params4bit(
        torch.empty((out * width + 1) // 2, 1, dtype=torch.uint8),
        requires_grad=False,
        quant_state=quantised,
        quant_type="nf4",
        bnb_quantized=True,
    )
    new.quant_state = quantised
    new.support_avx512bf16_for_cpu = False  # a layout for inference on some processors
    return new


class Faker:
    """Meta tensors to fake ones that say they are on the CPU, each once."""

    def __init__(self, mode: FakeTensorMode):
        self._mode = mode
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def tensor(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._made:
            made = FakeTensor(self._mode, tensor.detach().as_subclass(Tensor), torch.device("cpu"))
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
                made.__dict__.update(tensor.__dict__)
            self._made[id(tensor)] = made, tensor
        return self._made[id(tensor)][0]

    def model(self, model: nn.Module) -> None:
        """Replace every parameter, buffer and scale of a model on the meta device."""
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.is_meta and not isinstance(tensor, FakeTensor):
                        tensors[name] = self.tensor(tensor)
            if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
                self._state(state)

    def _state(self, state):
        for name in ("absmax", "code", "offset"):
            value = getattr(state, name)
            if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
                setattr(state, name, self.tensor(value))
        if state.state2 is not None:
            self._state(state.state2)


def scales_of(model: nn.Module):
    """(path of its linear, tensor) of every quantised linear's scales."""
    for path, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and hasattr(module, "in_features"):
            for part in (state, state.state2) if state.state2 is not None else (state,):
                yield from ((path, x) for x in (part.absmax, part.code, part.offset) if isinstance(x, Tensor))
