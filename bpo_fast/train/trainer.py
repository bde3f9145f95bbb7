"""BPOConfig and BPOTrainer: preference training and SFT on packed rows, over transformers' Trainer.

The trainer joins packing, model and losses. Loops, logging, saving, resuming and distribution are those of
transformers.Trainer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from bpo_fast.losses.preference import LOSS_OPTIONS, LossConfig, desensitized, mean_aligned_logps, sequence_preference
from bpo_fast.losses.table import F_DIVERGENCES, LOSSES, SORTED_LOSSES
from bpo_fast.models.load import load_model, load_processor
from bpo_fast.models.lora import restrict_to_decoder
from bpo_fast.models.packed_forward import enable_packed_forward, image_features, sum_branches
from bpo_fast.models.packing import Packing
from bpo_fast.ops.rows import TokenStatistics
from bpo_fast.train.collator import PackedRow, PreferenceCollator

_COLUMNS = ("images", "image", "prompt", "chosen", "rejected")


@dataclass
class BPOConfig(TrainingArguments):
    """Training arguments, with the names and defaults of TRL's DPOConfig where both have them.

    Args:
        learning_rate: peak learning rate; the paper trains at 2e-6.
        beta: strength of the pull to the reference (Rafailov et al. 2023, equation 7).
        loss_type: one or several losses of `bpo_fast.LossConfig`, which says what they and the options below are.
            "sft" alone is maximum likelihood of the chosen responses, and reads no rejected ones. Losses without a
            reference ("simpo", "cpo", "orpo", "sft") do not run it: rewards are then beta times log-probs.
        loss_weights, ld_alpha, f_divergence_type, f_alpha_divergence_coef, use_weighting, discopop_tau, simpo_gamma:
            fields of `bpo_fast.LossConfig`.
        label_smoothing: probability that a preference is the wrong way round ("sigmoid" is smoothed, too; TRL does
            not).
        max_length: most positions of prompt, image and response together; a longer response is cut at its end.
        token_budget: most tokens of one packed row. A step whose pairs need more runs several rows one after the
            other, with the same result in less memory. None runs a step's pairs as one row.
        disable_dropout: switch every dropout off, adapter's included; the reference and the policy are then one
            network.
        bf16: by default on where a CUDA device computes in it.
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate; the paper trains at 2e-6."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many update steps."})
    gradient_checkpointing: bool = field(
        default=True, metadata={"help": "Recompute activations in the backward pass."}
    )
    bf16: bool | None = field(default=None, metadata={"help": "bfloat16 autocast; by default where CUDA has it."})
    beta: float = field(default=0.1, metadata={"help": "Strength of the pull to the reference."})
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"], metadata={"help": f"One or several of {', '.join(LOSSES)}."}
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "A weight for each loss type; all 1 by default."}
    )
    label_smoothing: float = field(default=0.0, metadata={"help": "Probability of a flipped preference."})
    ld_alpha: float | None = field(
        default=None, metadata={"help": "Weight of tokens past the shorter response's length (LD-DPO); by default 1."}
    )
    f_divergence_type: str = field(
        default="reverse_kl",
        metadata={"help": f"Pull to the reference: {', '.join(F_DIVERGENCES)} (f-DPO)."},
    )
    f_alpha_divergence_coef: float = field(default=0.5, metadata={"help": "Alpha of alpha_divergence."})
    use_weighting: bool = field(default=False, metadata={"help": "Weigh pairs by their likelihood (WPO)."})
    discopop_tau: float = field(default=0.05, metadata={"help": "Temperature of discopop."})
    simpo_gamma: float = field(default=0.5, metadata={"help": "Margin of simpo."})
    max_length: int | None = field(default=1024, metadata={"help": "Most positions of prompt, image and response."})
    token_budget: int | None = field(default=None, metadata={"help": "Most tokens of one packed row."})
    disable_dropout: bool = field(default=True, metadata={"help": "Switch every dropout off."})

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        if self.gradient_checkpointing and self.gradient_checkpointing_kwargs is None:
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        # Newer transformers call these two by other names, and warn of the old ones where only those are set.
        for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
            new = old.replace("gradient", "activation")
            if getattr(self, new, False) is None:
                setattr(self, new, getattr(self, old))
        self.loss_config()
        if self.token_budget is not None and not SORTED_LOSSES.isdisjoint(self.loss_type):
            raise ValueError(
                f"token_budget: found {self.token_budget} with loss_type {self.loss_type}, expected None; 'aot' and "
                "'aot_unpaired' sort the pairs of a step, which must lie in one row."
            )
        super().__post_init__()

    def loss_config(self) -> LossConfig:
        """The fields that `LossConfig` has too, checked."""
        return LossConfig(**{name: getattr(self, name) for name in LOSS_OPTIONS if hasattr(self, name)})


class BPOTrainer(Trainer):
    """Trains a LoRA adapter on preference pairs, or on their chosen answers with `loss_type="sft"`.

    Takes the arguments of TRL's DPOTrainer, so a script runs on either after its import lines are changed. The
    reference is the model with its adapter disabled; there is no second model. The adapter goes on the language
    model's linears only, and the vision part is frozen.

    Args:
        model: a vision-language model, or the path of one.
        args: training arguments; `output_dir` "bpo_output" by default.
        train_dataset: rows with TRL's vision preference columns `images` (or `image`), `prompt`, `chosen`, `rejected`.
        eval_dataset: rows of the same form, or a dictionary of such data sets.
        processing_class: the model's processor; by default the one saved with the model.
        callbacks, optimizers: as transformers.Trainer takes them.
        peft_config: the adapter to make. Only a model that already has a fresh one may come without.

    Raises:
        ValueError: there is no adapter to train, it is not a fresh one, or a column is missing.

    Example:
        ```python
        trainer = BPOTrainer(
            model="llava-hf/llava-1.5-7b-hf",
            args=BPOConfig(output_dir="bpo", learning_rate=2e-6),
            train_dataset=load_preference_dataset("pairs"),
            peft_config=LoraConfig(r=64),
        )
        trainer.train()
        ```
    """

    # The loss is a mean over the pairs of one batch: the Trainer divides it by the accumulated batches.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: BPOConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class: ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        peft_config: PeftConfig | None = None,
    ):
        args = args or BPOConfig(output_dir="bpo_output")
        set_seed(args.seed)  # the adapter's first weights are random
        if isinstance(model, str | Path):
            processing_class = processing_class or load_processor(model)
            model = load_model(model, device=args.device)
        processing_class = processing_class or load_processor(model.config._name_or_path)
        model = _with_adapter(model, peft_config)
        enable_packed_forward(model.get_base_model())
        if args.disable_dropout:
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        self.loss_config = args.loss_config()
        self.responses = ("chosen",) if self.loss_config.loss_types == ("sft",) else ("chosen", "rejected")
        evaluated = eval_dataset.items() if isinstance(eval_dataset, dict) else [("eval_dataset", eval_dataset)]
        for name, dataset in [("train_dataset", train_dataset), *evaluated]:
            _check_columns(name, dataset, self.responses)
        collator = PreferenceCollator(
            processing_class,
            image_token_id=getattr(model.config, "image_token_id", None),
            max_length=args.max_length,
            token_budget=args.token_budget,
            responses=self.responses,
        )
        # For each packed row since the last log: name -> (sum, count).
        self._metrics: dict[str, list[dict[str, tuple]]] = {"train": [], "eval": []}
        self._num_train_tokens = 0
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )

    def _set_signature_columns_if_needed(self):
        self._signature_columns = list(_COLUMNS)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One backward pass per packed row; each row's loss is its share of the batch's mean."""
        return sum(super(BPOTrainer, self).training_step(model, {"row": row}) for row in inputs["rows"])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """A packed row's share of the batch's loss; see `transformers.Trainer.compute_loss`."""
        row: PackedRow = inputs["row"]
        compute = self._sft_loss if self.responses == ("chosen",) else self._pair_loss
        loss, metrics = compute(model, row)
        self._metrics["train" if model.training else "eval"].append(metrics)
        if model.training:
            self._num_train_tokens += row.packing.num_unshared_tokens
        return (loss, metrics) if return_outputs else loss

    def _model_inputs(self, model, row: PackedRow) -> dict:
        # The frozen vision part runs once for policy and reference, chosen and rejected.
        features = image_features(model, row.image_inputs) if row.image_inputs else None
        return {"packing": row.packing, "image_features": features, "image_rows": row.image_rows}

    def _sft_loss(self, model, row: PackedRow):
        inputs = self._model_inputs(self.accelerator.unwrap_model(model), row)
        output = model(**inputs, with_statistics=True)
        count = len(output.token_logps)
        metrics = {
            "logps/chosen": (output.token_logps.detach().sum(), row.packing.num_branches),
            "entropy": (output.statistics.entropy.sum(), count),
            "mean_token_accuracy": (output.statistics.is_top1.sum(), count),
            "logits/chosen": (output.statistics.mean_logits.sum(), count),
        }
        (weight,) = self.loss_config.weights
        return -weight * output.token_logps.sum() / row.num_chosen_tokens, metrics

    def _pair_loss(self, model, row: PackedRow):
        config, packing = self.loss_config, row.packing
        unwrapped = self.accelerator.unwrap_model(model)
        inputs = self._model_inputs(unwrapped, row)
        ref_logps = None
        if config.needs_reference:
            with torch.no_grad(), unwrapped.disable_adapter():
                ref_logps = _sums(model(**inputs).token_logps, packing, config.ld_alpha)
        policy = model(**inputs, with_statistics=True)
        logps = _sums(policy.token_logps, packing, config.ld_alpha)
        num_tokens = _chosen_first(packing.num_tokens)
        nll = aligned = None
        # The loss is a mean over this row's pairs, and becomes the row's share of the batch's below.
        share = packing.num_branches / 2 / row.num_groups
        if "sft" in config.loss_types:
            unweighted = logps if config.ld_alpha is None else _sums(policy.token_logps, packing)
            chosen, _ = unweighted.chunk(2)
            nll = -chosen.sum() / row.num_chosen_tokens / share
        if config.use_weighting:
            sums = partial(_sums, packing=packing)
            aligned = mean_aligned_logps(policy.token_logps, policy.statistics, sums, num_tokens)
        output = sequence_preference(
            logps,
            ref_logps,
            num_tokens,
            policy.token_logps,
            config,
            nll=nll,
            mean_aligned_logps=aligned,
            statistics=TokenStatistics(*(_sums(values, packing) for values in policy.statistics)),
        )
        pairs = {name: (values.sum(), len(values)) for name, values in output.pair_metrics().items()}
        return output.loss * share, pairs | output.token_metrics()

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The batch's loss; packed rows give no logits to return."""
        with torch.no_grad(), self.compute_loss_context_manager():
            rows = self._prepare_inputs(inputs)["rows"]
            loss = sum(self.compute_loss(model, {"row": row}) for row in rows)
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds TRL's metrics: means over the pairs, or the response tokens, since the last log."""
        mode = "train" if self.model.training else "eval"
        # Values wait on the device until here, so that a step costs no synchronisation.
        waiting, self._metrics[mode] = self._metrics[mode], []
        if waiting:
            names = list(waiting[0])
            numbers = [number for metrics in waiting for name in names for number in metrics[name]]
            table = torch.stack([_float64(number, self.args.device) for number in numbers])
            sums = table.view(len(waiting), -1).sum(0)
            sums = torch.cat([sums, sums.new_tensor([self._num_train_tokens])])
            *sums, num_tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
            prefix = "eval_" if mode == "eval" else ""
            for name, total, count in zip(names, sums[::2], sums[1::2], strict=True):
                logs[prefix + name] = total / max(1.0, count)
            logs[prefix + "num_tokens"] = int(num_tokens)
        super().log(logs, start_time)


def _chosen_first(branches: torch.Tensor) -> torch.Tensor:
    """[2B] in the packed order chosen, rejected, chosen, ... -> [2B], all chosen and then all rejected."""
    return branches.view(-1, 2).t().reshape(-1)


def _float64(number: torch.Tensor | int, device: torch.device) -> torch.Tensor:
    """A scalar on the device; a host's number is filled in there, which unlike a copy waits for nothing."""
    if isinstance(number, torch.Tensor):
        return number.to(torch.float64)
    return torch.full((), number, dtype=torch.float64, device=device)


def _sums(token_logps: torch.Tensor, packing: Packing, ld_alpha: float | None = None) -> torch.Tensor:
    """Sums [2B], chosen first, of a packed row's token values [N]; with `ld_alpha` of desensitized log-probs."""
    if ld_alpha is not None:
        num_tokens = _chosen_first(packing.num_tokens)
        pairs = packing.branch_index // 2
        token_logps = desensitized(token_logps, packing.branch_offset, pairs, num_tokens, ld_alpha)
    return _chosen_first(sum_branches(token_logps, packing))


def _with_adapter(model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None) -> PeftModel:
    if not isinstance(model, PeftModel):
        if peft_config is None:
            raise ValueError(
                "peft_config: found None for a model without an adapter, expected a LoraConfig; the reference is the "
                "model with its adapter disabled, so pass peft_config=LoraConfig(r=64)."
            )
        return get_peft_model(model, restrict_to_decoder(peft_config, model))
    if peft_config is not None:
        raise ValueError(
            "peft_config: found one for a model that has an adapter already, expected one or the other; merge the "
            "adapter first with model.merge_and_unload()."
        )
    if any(name.endswith("lora_B.default.weight") and bool(p.any()) for name, p in model.named_parameters()):
        raise ValueError(
            "model: its adapter is trained already, expected a fresh one, since the reference is the model with the "
            "adapter disabled; merge it first with model.merge_and_unload() and pass a peft_config."
        )
    return model


def _check_columns(name: str, dataset, responses: tuple[str, ...]) -> None:
    columns = getattr(dataset, "column_names", None)
    if columns is None:
        if dataset is None and name == "train_dataset":
            raise ValueError("train_dataset: found None, expected preference pairs; see bpo_fast.data.")
        return
    missing = [column for column in ("prompt", *responses) if column not in columns]
    if not {"images", "image"} & set(columns):
        missing.append("images")
    if missing:
        raise ValueError(
            f"{name}: found columns {sorted(columns)}, expected {missing} too; TRL's vision preference columns are "
            "images, prompt, chosen, rejected."
        )


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint that was written to its end, or None.

    The trainer's state is the last file of a checkpoint, so a run killed while it saves leaves one without it, or with
    half of it; such a folder is passed over and written anew when training comes by again.

    Args:
        output_dir: of the run; it need not exist.
    """
    found = []
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            found.append((json.loads((folder / "trainer_state.json").read_text())["global_step"], str(folder)))
        except (OSError, ValueError, KeyError):
            continue
    return max(found)[1] if found else None
