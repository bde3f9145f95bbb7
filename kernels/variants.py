"""The forms of each kernel that the ops launch, as `aot.py` compiles them without a GPU."""

from dataclasses import dataclass, field, replace
from functools import partial

from triton.compiler import ASTSource

from bpo_fast.kernels import heuristics, sequence_logps, sequence_logps_backward, sigmoid_preference, unit_gradient

_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
# Numbers that the launchers pass as float32; the other numbers are int32, and pointers are named by each form.
_FLOATS = {"softcap", "inverse_temperature", "beta", "label_smoothing"}
# Shapes that stand for the widest tile, a tile of one warp, and rows that are split on a GPU of 132 multiprocessors.
_WIDE, _NARROW, _FEW = (8192, 128256, 132), (8192, 208, 132), (1, 128256, 132)


@dataclass(frozen=True)
class Variant:
    """One kernel with the types of its pointers and the values of its constants.

    `aligned` tells the compiler, as the launcher does for such numbers, that the vocabulary and all strides are
    multiples of 16; it then reads 16 bytes at a time. Other vocabularies run the other form.
    """

    name: str
    kernel: object
    pointers: dict
    constants: dict = field(default_factory=dict)
    num_warps: int = 8
    aligned: bool = False

    @property
    def options(self):
        return {**heuristics.COMPILER_OPTIONS, "num_warps": self.num_warps}

    def source(self):
        signature, attributes = {}, {}
        for position, argument in enumerate(self.kernel.arg_names):
            if argument in self.constants:
                signature[argument] = "constexpr"
            elif argument in self.pointers:
                signature[argument] = f"*{self.pointers[argument]}"
                # PyTorch's allocations are aligned to at least 16 bytes, and the launcher tells the compiler so.
                attributes[(position,)] = [["tt.divisibility", 16]]
            else:
                signature[argument] = "fp32" if argument in _FLOATS else "i32"
                counts_columns = argument in ("vocab_size", "split_columns", "strip") or argument.endswith("_stride")
                if self.aligned and counts_columns:
                    attributes[(position,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, self.constants, attributes)


def _tr(on):
    both = {"HAS_SOFTCAP": "softcap", "HAS_TEMPERATURE": "inverse_temperature"}
    return {name: None for flag, name in both.items() if flag not in on}


def _launch(shape, element, heavy, aligned):
    num_rows, vocab_size, num_processors = shape
    element_size = 4 if element == "fp32" else 2
    return heuristics.row_launch(num_rows, vocab_size, element_size, num_processors, heavy=heavy, aligned=aligned)


def _tile(launch):
    return dict(zip(("COLUMNS", "VECTOR", "INTERLEAVED", "UNROLL"), launch[:4], strict=True))


def _forward(label, dtype, *on, aligned, shape=_WIDE):
    element = _TYPES[dtype]
    launch = _launch(shape, element, "WITH_STATISTICS" in on, aligned)
    pointers = {"policy": element, "reference": element, "targets": "i64"}
    pointers |= dict.fromkeys(("token_logps", "row_numbers"), "fp32")
    optional = {
        "policy_sums": ("fp32", "WITH_SUMS" in on),
        "reference_sums": ("fp32", "WITH_SUMS" in on),
        "num_targets": ("i64", "WITH_SUMS" in on),
        "statistics": ("fp32", "WITH_STATISTICS" in on),
        "parts": ("fp32", launch.splits > 1),
        "arrivals": ("i32", "WITH_SUMS" in on or launch.splits > 1),
    }
    constants = _tr(on)
    constants |= {"SPLITS": launch.splits, "TOKENS": sequence_logps.TOKENS, **_tile(launch)}
    constants |= {name: None for name, (_, given) in optional.items() if not given}
    pointers |= {name: kind for name, (kind, given) in optional.items() if given}
    name = f"sequence_logps[{dtype}{label}]"
    return Variant(name, sequence_logps.sequence_logps_kernel, pointers, constants, launch.num_warps, aligned)


def _backward(label, dtype, *on, aligned, shape=_WIDE):
    element = _TYPES[dtype]
    launch = _launch(shape, element, "HAS_SOFTCAP" in on or not aligned, aligned)
    pointers = {"logits": element, "targets": "i64", "row_numbers": "fp32", "grad_logits": element}
    constants = _tr(on) | _tile(launch)
    for name, flag in (("grad_token_logps", "HAS_GRAD_TOKENS"), ("grad_sums", "HAS_GRAD_SUMS")):
        if flag in on:
            pointers[name] = "fp32"
        else:
            constants[name] = None
    name = f"sequence_logps_backward[{dtype}{label}]"
    return Variant(
        name, sequence_logps_backward.sequence_logps_backward_kernel, pointers, constants, launch.num_warps, aligned
    )


def _unit_gradient(label, dtype, *on, aligned, shape=_WIDE):
    launch = _launch(shape, "fp32", bool({"WITH_STATISTICS", "HAS_SOFTCAP"} & set(on)), aligned)
    pointers, constants = {"logits": "fp32", "logps": "fp32"}, _tile(launch)
    optional = {
        "HAS_TARGETS": ("targets", "i64"),
        "HAS_BIAS": ("bias", _TYPES[dtype]),
        "HAS_SCALE": ("scale", "fp32"),
        "WITH_GRADIENT": ("gradient", _TYPES[dtype]),
        "WITH_STATISTICS": ("statistics", "fp32"),
    }
    for flag, (name, kind) in optional.items():
        if flag in on:
            pointers[name] = kind
        else:
            constants[name] = None
    # Strides of what is not there are 0.
    constants |= {} if "WITH_GRADIENT" in on else {"gradient_stride": 0}
    constants |= {} if "WITH_STATISTICS" in on else {"statistics_stride": 0}
    constants |= _tr(on)
    name = f"unit_gradient[{dtype}{label}]"
    return Variant(name, unit_gradient.unit_gradient_kernel, pointers, constants, launch.num_warps, aligned)


def _sigmoid_preference(label, *on):
    pointers = dict.fromkeys(("logps", "loss", "rewards", "coefficients"), "fp32")
    constants = {"PAIRS": sigmoid_preference.PAIRS}
    for flag, name, kind in (("HAS_REFERENCE", "ref_logps", "fp32"), ("AVERAGE", "num_tokens", "i64")):
        if flag in on:
            pointers[name] = kind
        else:
            constants[name] = None
    kernel = sigmoid_preference.sigmoid_preference_kernel
    return Variant(f"sigmoid_preference[{label}]", kernel, pointers, constants, 4)


def _rows_variants(aligned):
    transform = ("HAS_SOFTCAP", "HAS_TEMPERATURE")
    forward, backward, unit = (partial(form, aligned=aligned) for form in (_forward, _backward, _unit_gradient))
    for dtype in _TYPES:
        yield forward("", dtype)
        yield forward(",sums", dtype, "WITH_SUMS")
        yield forward(",sums,statistics", dtype, "WITH_SUMS", "WITH_STATISTICS")
        yield forward(",split", dtype, shape=_FEW)
        yield forward(",everything", dtype, "WITH_SUMS", "WITH_STATISTICS", *transform, shape=_FEW)
        yield backward(",sums", dtype, "HAS_GRAD_SUMS")
        yield backward(",tokens", dtype, "HAS_GRAD_TOKENS")
        yield backward(",everything", dtype, "HAS_GRAD_TOKENS", "HAS_GRAD_SUMS", *transform)
        yield unit("", dtype, "HAS_TARGETS", "WITH_GRADIENT")
        yield unit(",statistics", dtype, "HAS_TARGETS", "WITH_GRADIENT", "WITH_STATISTICS")
        yield unit(",everything", dtype, "HAS_TARGETS", "HAS_BIAS", "HAS_SCALE", "WITH_GRADIENT", *transform)
    yield forward(",sums,narrow", "bfloat16", "WITH_SUMS", shape=_NARROW)
    yield backward(",sums,narrow", "bfloat16", "HAS_GRAD_SUMS", shape=_NARROW)
    yield unit(",log-probs only", "float32", "HAS_TARGETS")
    yield unit(",log-sum-exp", "bfloat16", "WITH_GRADIENT")


def variants():
    """Every kernel in every form that the ops launch."""
    aligned = [replace(variant, name=f"{variant.name} aligned") for variant in _rows_variants(aligned=True)]
    # The launcher turns integers that are 1 into constants, so a single row is another program.
    single = _forward(",sums,ones", "float32", "WITH_SUMS", aligned=False)
    ones = dict.fromkeys(("num_rows", "num_sequences", "num_tokens", "vocab_size"), 1)
    return [
        *_rows_variants(aligned=False),
        *aligned,
        replace(single, constants=single.constants | ones),
        _sigmoid_preference("reference", "HAS_REFERENCE"),
        _sigmoid_preference("everything", "HAS_REFERENCE", "AVERAGE"),
    ]
