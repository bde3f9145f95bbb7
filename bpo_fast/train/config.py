"""BPOConfig: transformers' training arguments, the loss options of `LossConfig`, and what packing adds."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import Field, dataclass, field, fields, make_dataclass
from typing import Any, get_type_hints

import torch
from transformers import TrainingArguments
from transformers.utils import is_liger_kernel_available

from bpo_fast.losses.config import LOSS_OPTIONS, LossConfig
from bpo_fast.losses.table import losses_that
from bpo_fast.models.weaken import SCHEDULES, TARGETS
from bpo_fast.models.weakened_roots import Weakening
from bpo_fast.train.loading import default_num_workers
from bpo_fast.train.options import CHECKPOINTING, check_options, check_processes

_TYPES = get_type_hints(LossConfig)

# The noise of a loss that weakens images, where nothing else is asked for.
NOISE = {"noise_step": 500, "noise_target": "features", "noise_schedule": "sigmoid"}


def _default(option: Field) -> dict[str, Any]:
    # HfArgumentParser reads the default of an option that may be a list from its factory alone.
    if isinstance(option.default, str) and _TYPES[option.name] is not str:
        return {"default_factory": lambda: [option.default]}
    return {"default": option.default}


# The fields of LossConfig, with its types, defaults and help, for a class that is not frozen.
LossOptions = make_dataclass(
    "LossOptions",
    [
        (option.name, _TYPES[option.name], field(**_default(option), metadata={"help": option.metadata["help"]}))
        for option in fields(LossConfig)
    ],
    namespace={"__module__": __name__},
)


@dataclass
class BPOConfig(LossOptions, TrainingArguments):
    """Training arguments, with the names and defaults of TRL's DPOConfig where both have them.

    Every field of `bpo_fast.LossConfig` is one of this class too: `beta`, `loss_type`, `loss_weights`, ... "sft" alone
    as `loss_type` is maximum likelihood of the chosen responses, and reads no rejected ones. Losses without a
    reference ("simpo", "cpo", "orpo", "sft") do not run it: rewards are then beta times log-probs.

    Options of transformers that have no effect here, or would break what is promised of a run, are refused by name:
    `bpo_fast.train.options.REFUSED` says why.

    Args:
        output_dir: folder of the run.
        learning_rate: peak learning rate; the paper trains at 2e-6.
        noise_step: step of the noise schedule by which images are weakened for a loss that reads them so ("mdpo"); by
            default 500. A pair's noise is drawn from `seed` and is the same in every epoch.
        noise_target: what that noise is put on, "features" (the default), "pixels" or "projected"; features that are
            kept (`cache_image_features`) can be noised as "projected" alone.
        noise_schedule: "sigmoid" (the default), "linear" or "cosine".
        max_length: most positions of prompt, image and response together; a longer response is cut at its end.
        token_budget: most tokens of one packed sequence. A step whose pairs need more runs several one after the
            other, with the same result in less memory. None runs a step's pairs as one.
        checkpointing: what of a layer is kept for the backward pass, see `bpo_fast.models.checkpointing`; the result
            is the same in every mode. None is "full" or "none", as `gradient_checkpointing` says.
        disable_dropout: switch every dropout off, adapter's included; the reference and the policy are then one
            network.
        bf16: by default on where training runs on a CUDA device that computes in it. A checkpoint in float16 is then
            loaded in bfloat16.
        deterministic_attention: add up attention's gradients on a GPU in a fixed order, by which a run has the same
            bits every time, for some time and memory; `full_determinism` asks for it too. A CPU always does.
        fused_lora: run PEFT's LoRA linears as one operation each (`models.fused_linear`), with the same adapter.
        keep_dequantized: with nf4 and checkpointing, hold a layer's weights in 16 bits from its recomputation to its
            backward pass: of three dequantisations a step one is saved, for the memory of a layer in 16 bits.
        dataloader_num_workers: processes that prepare batches while the step before computes; the result does not
            depend on it. By default one to four for a GPU and none on a CPU, whose cores compute.
        dataloader_persistent_workers: keep them from epoch to epoch; by default they are.
        use_liger_kernel: norms, rotations and gated activations of the language model by Liger's kernels, never its
            losses (`models.elementwise`). None is where liger-kernel is installed and the model trains on CUDA.
        strict: raise for an example that cannot be trained on; by default it is left out and listed in `output_dir`.
        precompute_ref_log_probs: keep the reference's log-probs of every pair on disk, made before the first step.
        cache_image_features: keep the vision part's output for every image on disk; no image is then decoded and no
            vision tower run while training steps.
        cache_dir: folder of both; runs share it. By default bpo_fast in $XDG_CACHE_HOME, or in ~/.cache.

    Raises:
        TypeError, ValueError: an option of the wrong kind, out of its range, without effect, or at odds with another.
    """

    output_dir: str = field(default="bpo_output/train", metadata={"help": "Folder of the run; it resumes in it."})
    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate; the paper trains at 2e-6."})
    logging_steps: float = field(default=10, metadata={"help": "Update steps between two logs."})
    gradient_checkpointing: bool = field(
        default=True, metadata={"help": "Recompute activations in the backward pass."}
    )
    checkpointing: str | None = field(
        default=None,
        metadata={
            "help": "What layers compute again in the backward pass: none, selective (all but linears), every_N (each "
            "N-th layer), full, or offload (full, inputs held on the host). By default as gradient_checkpointing says."
        },
    )
    bf16: bool | None = field(default=None, metadata={"help": "bfloat16 autocast; by default where CUDA has it."})
    deterministic_attention: bool = field(
        default=False, metadata={"help": "Add up attention's gradients in a fixed order on a GPU too; slower."}
    )
    noise_step: int | None = field(
        default=None, metadata={"help": "Noise schedule step, 0 to 999, of the images that mdpo weakens; null is 500."}
    )
    noise_target: str | None = field(
        default=None, metadata={"help": f"What that noise is added to: {', '.join(TARGETS)}; null is features."}
    )
    noise_schedule: str | None = field(
        default=None, metadata={"help": f"Its schedule: {', '.join(SCHEDULES)}; null is sigmoid."}
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Most positions of prompt, image and response; longer responses are cut."}
    )
    token_budget: int | None = field(
        default=None, metadata={"help": "Most tokens of one packed sequence; null packs a step's pairs in one."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Switch every dropout off."})
    fused_lora: bool = field(
        default=True, metadata={"help": "Run a linear and its LoRA as one operation, q/k/v and gate/up together."}
    )
    keep_dequantized: bool = field(
        default=False,
        metadata={"help": "With nf4: hold a recomputed layer's weights in 16 bits until its backward pass."},
    )
    use_liger_kernel: bool | None = field(
        default=None,
        metadata={"help": "Liger's norms, rotations and activations, not its losses; by default where they run."},
    )
    strict: bool = field(
        default=False, metadata={"help": "Stop for a pair that cannot be used instead of leaving it out."}
    )
    precompute_ref_log_probs: bool = field(
        default=False, metadata={"help": "Keep the reference's log-probs on disk, made before the first step."}
    )
    cache_image_features: bool = field(
        default=False, metadata={"help": "Keep the vision part's output on disk, made before the first step."}
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder of both; by default bpo_fast in $XDG_CACHE_HOME, or in ~/.cache."}
    )
    dataloader_num_workers: int | None = field(
        default=None,
        metadata={"help": "Processes that prepare batches; 0 does it between steps, null takes up to 4 for a GPU."},
    )
    dataloader_persistent_workers: bool | None = field(
        default=None, metadata={"help": "Keep those processes from epoch to epoch; null does."}
    )
    # transformers' filter reads the loss back after every batch and logs one that is not finite as 0.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Refused: a loss that is not finite stops the run."}
    )

    def __post_init__(self):
        on_gpu = torch.cuda.is_available() and not self.use_cpu
        if self.bf16 is None:
            # Older GPUs only emulate it, which is slower than float32.
            self.bf16 = not self.fp16 and on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        if self.gradient_checkpointing and self.gradient_checkpointing_kwargs is None:
            self.gradient_checkpointing_kwargs = dict(CHECKPOINTING)
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = default_num_workers(on_gpu)
        if self.dataloader_persistent_workers is None:
            self.dataloader_persistent_workers = bool(self.dataloader_num_workers)
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        # Newer transformers call these two by other names, and warn of the old ones where only those are set.
        for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
            new = old.replace("gradient", "activation")
            if getattr(self, new, False) is None:
                setattr(self, new, getattr(self, old))
        if self.report_to is None:
            self.report_to = "none"
        check_options(self)
        self.loss_config()
        sorting = losses_that("sorts_batch")
        if self.token_budget is not None and not sorting.isdisjoint(self.loss_type):
            raise ValueError(
                f"token_budget: found {self.token_budget} with loss_type {self.loss_type}, expected None; "
                f"{' and '.join(map(repr, sorted(sorting)))} sort the pairs of a step, which must lie in one sequence."
            )
        self._settle_noise()
        if self.precompute_ref_log_probs and not self.loss_config().needs_reference:
            raise ValueError(
                f"precompute_ref_log_probs: found True with loss_type {self.loss_type}, expected False, since it "
                "reads no reference; leave it out."
            )
        super().__post_init__()
        check_processes(self)
        if self.use_liger_kernel and not is_liger_kernel_available():
            raise ImportError(
                "use_liger_kernel: found True without liger-kernel; pip install 'liger-kernel>=0.8', or leave it out."
            )
        if self.use_liger_kernel and self.device.type != "cuda":
            raise ValueError(
                f"use_liger_kernel: found True on {self.device.type}, expected False, since its kernels run on a GPU "
                "alone; leave it out."
            )
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("fp16: found True on a CPU, expected False; set bf16 to true, or leave both out.")
        for name in ("split_batches", "dispatch_batches"):
            if getattr(self.accelerator_config, name):
                raise ValueError(
                    f"accelerator_config: found {name}=True, expected False: every process packs its own pairs."
                )

    def _settle_noise(self) -> None:
        """Fill in the noise of a loss that weakens images, and refuse it for others."""
        if not self.loss_config().reads_weakened:
            for name in NOISE:
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}: found {getattr(self, name)!r} with loss_type {self.loss_type}, expected None, since "
                        "it weakens no image; leave it out."
                    )
            return
        for name, default in NOISE.items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        self.weakening()
        if self.cache_image_features and self.noise_target != "projected":
            raise ValueError(
                f"cache_image_features: found True with noise_target '{self.noise_target}', expected False, since "
                "features are kept behind the projector; set noise_target to 'projected', or leave the cache out."
            )

    @property
    def fuses_elementwise(self) -> bool:
        """`use_liger_kernel`, or whether this machine can."""
        if self.use_liger_kernel is not None:
            return self.use_liger_kernel
        return self.device.type == "cuda" and is_liger_kernel_available()

    @property
    def checkpointing_mode(self) -> str | None:
        """`checkpointing`, or what `gradient_checkpointing` stands for; None for arguments of transformers' own."""
        if self.checkpointing is not None:
            return self.checkpointing
        if not self.gradient_checkpointing:
            return "none"
        return "full" if self.gradient_checkpointing_kwargs in (None, {}, CHECKPOINTING) else None

    @contextmanager
    def layers_as_they_are(self) -> Iterator[None]:
        """Keeps transformers from setting its own checkpointing, of vision layers too, and Liger's losses."""
        names = ("gradient_checkpointing", "activation_checkpointing") if self.checkpointing_mode is not None else ()
        names += ("use_liger_kernel",)
        own = {name: getattr(self, name) for name in names if hasattr(self, name)}
        try:
            for name in own:
                setattr(self, name, False)
            yield
        finally:
            for name, value in own.items():
                setattr(self, name, value)

    def weakening(self) -> Weakening | None:
        """The noise on the images of second roots; None where no loss reads them."""
        if not self.loss_config().reads_weakened:
            return None
        return Weakening(self.noise_step, self.noise_target, self.noise_schedule, self.seed)

    def loss_config(self) -> LossConfig:
        """The loss options, checked."""
        return LossConfig(**{name: getattr(self, name) for name in LOSS_OPTIONS})
