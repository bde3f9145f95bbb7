"""BPOTrainer: preference training and SFT on packed sequences, over transformers' Trainer.

The trainer joins packing, model and losses. Loops, logging, saving, resuming and distribution are those of
transformers.Trainer.
"""

import shutil
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin, Trainer, TrainerCallback, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, enable_full_determinism, rotate_checkpoints

from bpo_fast.losses.preference import token_preference
from bpo_fast.models.checkpointing import set_checkpointing
from bpo_fast.models.elementwise import fuse_elementwise
from bpo_fast.models.fused_linear import fuse_linears
from bpo_fast.models.load import load_model, load_processor
from bpo_fast.models.lora import adapter_disabled, check_gradients, with_fresh_adapter
from bpo_fast.models.packed_forward import enable_packed_forward, image_features
from bpo_fast.models.weakened_roots import check_weakening, features_of_both_roots
from bpo_fast.ops.rows import TokenStatistics
from bpo_fast.runs.files import write_jsonl
from bpo_fast.train.caches import use_caches
from bpo_fast.train.check_pairs import check_columns, check_pairs
from bpo_fast.train.checkpoints import (
    SEAL_FILE,
    check_checkpoint,
    last_complete_checkpoint,
    not_written,
    seal_checkpoint,
)
from bpo_fast.train.collator import PackedSequence, PreferenceCollator
from bpo_fast.train.config import BPOConfig
from bpo_fast.train.examples import EXAMPLE_COLUMNS, Examples
from bpo_fast.train.finite import FiniteGuard
from bpo_fast.train.loading import Waiting, by_itself, errors_of_workers
from bpo_fast.train.metrics import MetricSums
from bpo_fast.train.options import check_batch, check_devices
from bpo_fast.train.responses import packed_responses
from bpo_fast.train.start_check import check_packed_forward, evaluated

UNUSABLE_FILE = "unusable_pairs.jsonl"


class BPOTrainer(Trainer):
    """Trains a LoRA adapter on preference pairs, or on their chosen answers with `loss_type="sft"`.

    Takes the arguments of TRL's DPOTrainer, so a script runs on either after its import lines are changed. The
    reference is the model with its adapter disabled; there is no second model. The adapter goes on the language
    model's linears only, and the vision part is frozen.

    Args:
        model: a vision-language model, or the path of one.
        args: training arguments; `BPOConfig()` by default.
        train_dataset: examples with TRL's vision preference columns `images` (or `image`), `prompt`, `chosen`,
            `rejected`, and token weights if there are any; see `PreferenceCollator`.
        eval_dataset: examples of the same form, or a dictionary of such data sets.
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
        args = args or BPOConfig()
        check_devices(args)
        # The adapter's first weights are random. What full determinism sets has to stand before the first product.
        enable_full_determinism(args.seed) if args.full_determinism else set_seed(args.seed)
        if isinstance(model, str | Path):
            processing_class = processing_class or load_processor(model)
            model = load_model(model, device=args.device, float16_as=torch.bfloat16 if args.bf16 else None)
        processing_class = processing_class or load_processor(model.config._name_or_path)
        model = with_fresh_adapter(model, peft_config)
        if args.fused_lora:
            fuse_linears(model, keep_dequantized=args.keep_dequantized)
        enable_packed_forward(model.get_base_model())
        if args.disable_dropout:
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        if args.checkpointing_mode is not None:
            set_checkpointing(model.get_base_model().get_decoder(), args.checkpointing_mode)
        self.loss_config, self.weakening = args.loss_config(), args.weakening()
        self.responses = ("chosen",) if self.loss_config.loss_types == ("sft",) else ("chosen", "rejected")
        evaluated = eval_dataset.items() if isinstance(eval_dataset, dict) else [("eval_dataset", eval_dataset)]
        if train_dataset is None:
            raise ValueError("train_dataset: found None, expected preference pairs; see bpo_fast.data.")
        for name, dataset in [("train_dataset", train_dataset), *evaluated]:
            if dataset is not None:
                check_columns(name, dataset, self.responses)
        collator = PreferenceCollator(
            processing_class,
            image_token_id=getattr(model.config, "image_token_id", None),
            max_length=args.max_length,
            token_budget=args.token_budget,
            responses=self.responses,
            weakening=self.weakening,
        )
        self._metrics, self._waiting = {"train": MetricSums(), "eval": MetricSums()}, Waiting()
        # Tokens trained on in this process, and in all before it, whose number a checkpoint keeps.
        self._num_train_tokens, self._num_tokens_before = 0, 0
        self._guard = FiniteGuard()
        self._start_difference: float | None = None
        if args.ddp_broadcast_buffers is None:
            args.ddp_broadcast_buffers = False  # frozen ones, which no rank changes
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # `check_gradients` sees to it
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
        self.accelerator.dataloader_config.non_blocking = True  # a batch is copied while the step before computes
        if args.fuses_elementwise:  # on its device, where the kernels are tried
            fuse_elementwise(model.get_base_model().get_decoder())

    def _set_signature_columns_if_needed(self):
        self._signature_columns = [*EXAMPLE_COLUMNS, "number", "shown"]

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> TrainOutput:
        """Train, after every example and the model's packed forward were checked; see `transformers.Trainer.train`.

        Args:
            resume_from_checkpoint: a checkpoint of this trainer, or True for the newest one in `output_dir` that is
                whole. One at its run's last step is loaded, and nothing is trained.

        Raises:
            ValueError: a damaged checkpoint, no usable example, no step to train, a model whose packed forward is not
                its own forward, or a loss that is not finite.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint: found no whole checkpoint in '{self.args.output_dir}', expected one; "
                    "leave it out to start anew."
                )
        elif resume_from_checkpoint:
            check_checkpoint(resume_from_checkpoint)
        return self.train_from(resume_from_checkpoint or None, **kwargs)

    def train_from(self, checkpoint: str | None, **kwargs) -> TrainOutput:
        """`train` from a checkpoint that is known to be whole, whose files are not read for it again; None: anew."""
        self._use_checked_examples()
        check_batch(self.args, len(self.train_dataset))
        if checkpoint:
            state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
            self._num_tokens_before = state.num_input_tokens_seen
            if state.global_step >= state.max_steps:
                self._load_from_checkpoint(checkpoint)
                self.state = state
                return TrainOutput(state.global_step, 0.0, {})
        num_examples = min(self.args.per_device_train_batch_size, len(self.train_dataset))
        examples = list(map(self.train_dataset.whole, range(num_examples)))
        difference = check_packed_forward(self.model, self.data_collator, examples)
        if self.weakening is not None:
            first = self.data_collator(examples[:1])["sequences"][0].to(self.args.device)
            with evaluated(self.model):
                check_weakening(self.model, first.image_inputs, self.weakening)
        if not checkpoint:  # a resumed run's log is that of one that was not stopped
            self._start_difference = difference
        use_caches(self, self._kept_reference)
        self._gradients_unseen = True
        self._waiting.take()
        with errors_of_workers(), self.args.layers_as_they_are():
            output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        self._guard.check()
        return output

    def _use_checked_examples(self):
        """Leave out the examples that cannot be used, or raise for them with `args.strict`."""
        bad = []
        self.train_dataset = self._checked("train_dataset", self.train_dataset, bad)
        if isinstance(self.eval_dataset, dict):
            parts = {
                name: self._checked(f"eval_dataset {name}", part, bad) for name, part in self.eval_dataset.items()
            }
            self.eval_dataset = parts
        elif self.eval_dataset is not None:
            self.eval_dataset = self._checked("eval_dataset", self.eval_dataset, bad)
        if bad and self.is_world_process_zero():
            write_jsonl(Path(self.args.output_dir, UNUSABLE_FILE), bad)

    def _checked(self, name, dataset, bad):
        if isinstance(dataset, Examples):
            return dataset
        cache_file = Path(self.args.output_dir, f".checked_{name.replace(' ', '_')}.json")
        # The first process checks and keeps what it found; the others read that.
        with self.args.main_process_first(desc=f"checking {name}"):
            found = check_pairs(
                dataset, self.data_collator, strict=self.args.strict, cache_file=cache_file, desc=f"checking {name}"
            )
        if found and self.is_world_process_zero():
            whose = "" if name == "train_dataset" else f" of {name}"
            print(
                f"{len(found):,} of {len(dataset):,} pairs{whose} cannot be used and are left out, see "
                f"{Path(self.args.output_dir, UNUSABLE_FILE)}; the first is row {found[0].number}: {found[0].reason}"
            )
        bad += ({"dataset": name, **asdict(pair)} for pair in found)
        left_out = {pair.number for pair in found}
        return Examples(dataset, [number for number in range(len(dataset)) if number not in left_out])

    def get_train_dataloader(self):
        """Loads batches without drawing random numbers of the training; see `transformers.Trainer`."""
        return by_itself(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset=None):
        """Loads batches without drawing random numbers of the training; see `transformers.Trainer`."""
        return by_itself(super().get_eval_dataloader(eval_dataset))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of an update step, and how long they were waited for; see `transformers.Trainer`."""
        with self._waiting.waited():
            return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One backward pass per packed sequence; each one's loss is its share of the batch's mean."""
        step = super().training_step
        *others, last = inputs["sequences"]
        # Ranks may have different numbers of sequences: gradients are exchanged once, at the last.
        with self.accelerator.no_sync(model) if others else nullcontext():
            losses = [step(model, {"sequence": sequence}) for sequence in others]
        return sum([*losses, step(model, {"sequence": last})])

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if self._gradients_unseen:
            self._gradients_unseen = False
            check_gradients(self.model)
        # A loss scaler skips a step whose gradients overflow by itself.
        self._guard.end_step(self.state.global_step + 1, None if self.accelerator.scaler is not None else norm)
        return norm

    def _save_checkpoint(self, model, trial):
        """A checkpoint that is whole or not there; older ones are removed when it is whole, and not before."""
        self._guard.check()
        num_tokens = torch.tensor(self._num_train_tokens, device=self.args.device)
        num_tokens = int(self.accelerator.reduce(num_tokens, reduction="sum"))
        self.state.num_input_tokens_seen = self._num_tokens_before + num_tokens
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        if self.args.should_save:
            (folder / SEAL_FILE).unlink(missing_ok=True)
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seal_checkpoint(folder)
        # torch.save reports a full disk as a RuntimeError.
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"{folder}: found that it cannot be written ({not_written(error)}), expected room and leave "
                "to write there; the checkpoints before it are whole, and the same command resumes from the last."
            ) from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(str(folder.parent), limit, self.state.best_model_checkpoint)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """A packed sequence's share of the batch's loss; see `transformers.Trainer.compute_loss`."""
        sequence: PackedSequence = inputs["sequence"]
        compute = self._sft_loss if self.responses == ("chosen",) else self._pair_loss
        loss, metrics = compute(model, sequence)
        self._metrics["train" if model.training else "eval"].add(metrics)
        if model.training:
            self._guard.add_loss(sequence.numbers, loss)
            self._num_train_tokens += sequence.packing.num_unshared_tokens
        return (loss, metrics) if return_outputs else loss

    def _model_inputs(self, model, sequence: PackedSequence) -> dict:
        # The frozen vision part runs once for policy and reference, chosen and rejected.
        features = sequence.image_features
        if sequence.noise_ids is not None:
            noise = self.weakening, sequence.noise_ids, sequence.num_image_rows
            features = features_of_both_roots(model, sequence.image_inputs, *noise, kept=features)
        elif sequence.image_inputs:
            features = image_features(model, sequence.image_inputs)
        return {
            "packing": sequence.packing,
            "image_features": features,
            "image_rows": sequence.image_rows,
            "deterministic_attention": self.args.deterministic_attention or self.args.full_determinism,
        }

    def _sft_loss(self, model, sequence: PackedSequence):
        inputs = self._model_inputs(self.accelerator.unwrap_model(model), sequence)
        output = model(**inputs, with_statistics=True)
        count = len(output.token_logps)
        metrics = {
            "logps/chosen": (output.token_logps.detach().sum(), sequence.packing.num_branches),
            "entropy": (output.statistics.entropy.sum(), count),
            "mean_token_accuracy": (output.statistics.is_top1.sum(), count),
            "logits/chosen": (output.statistics.mean_logits.sum(), count),
        }
        (weight,) = self.loss_config.weights
        return -weight * output.token_logps.sum() / sequence.batch.num_chosen_tokens, metrics

    def _reference(self, model, inputs: dict) -> torch.Tensor:
        with torch.no_grad(), adapter_disabled(self.accelerator.unwrap_model(model)):
            return model(**inputs).token_logps

    def _kept_reference(self, sequence: PackedSequence) -> torch.Tensor:
        inputs = self._model_inputs(self.model, sequence.to(self.args.device))
        with self.accelerator.autocast():  # which the model has only while it trains
            return self._reference(self.model, inputs)

    def _pair_loss(self, model, sequence: PackedSequence):
        inputs = self._model_inputs(self.accelerator.unwrap_model(model), sequence)
        ref_token_logps = sequence.ref_token_logps
        if ref_token_logps is None and self.loss_config.needs_reference:
            ref_token_logps = self._reference(model, inputs)
        policy = model(**inputs, with_statistics=True)
        packing = sequence.packing
        responses = packed_responses(packing, packing.num_branches // self.loss_config.responses_per_pair)
        output = token_preference(
            policy.token_logps,
            responses,
            self.loss_config,
            ref_token_logps=ref_token_logps,
            statistics=policy.statistics,
            token_weights=sequence.token_weights,
            batch=sequence.batch,
        )
        output = replace(output, statistics=TokenStatistics(*map(responses.sums, policy.statistics)))
        pairs = {name: (values.sum(), len(values)) for name, values in output.pair_metrics().items()}
        return output.loss, pairs | output.token_metrics()

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The batch's loss; packed sequences give no logits to return."""
        with torch.no_grad(), self.compute_loss_context_manager():
            sequences = self._prepare_inputs(inputs)["sequences"]
            loss = sum(self.compute_loss(model, {"sequence": sequence}) for sequence in sequences)
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds TRL's metrics: means over the pairs, or the response tokens, since the last log."""
        mode = "train" if self.model.training else "eval"
        if (taken := self._metrics[mode].take(self.args.device)) is not None:
            names, sums = taken
            sums = torch.cat([sums, sums.new_tensor([self._num_train_tokens, *self._waiting.take()])])
            *sums, num_tokens, waited, seconds = self.accelerator.reduce(sums, reduction="sum").tolist()
            prefix = "eval_" if mode == "eval" else ""
            if mode == "train":
                logs["data_wait"] = round(waited / seconds, 4)
            for name, total, count in zip(names, sums[::2], sums[1::2], strict=True):
                logs[prefix + name] = total / max(1.0, count)
            logs[prefix + "num_tokens"] = self._num_tokens_before + int(num_tokens)
        if mode == "train" and self._start_difference is not None:
            logs["packed_forward_difference"], self._start_difference = self._start_difference, None
        super().log(logs, start_time)
