"""A model as a caller gives it: loaded, or the path of one that is loaded once there is work for it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bpo_fast.models.load import load_model, load_processor
from bpo_fast.models.weights import (
    check_adapter_files,
    check_model_files,
    local_folder,
    model_fingerprint,
    weights_fingerprint,
)


@dataclass(frozen=True)
class GivenModel:
    """What answers: a model, its processor and its adapter.

    Args:
        model: vision-language model of transformers, or the path of one.
        processor: its processor; None takes the one saved with the model.
        adapter: path of the LoRA adapter that `model` carries, or gets where `model` is a path.
        init_kwargs: further arguments of `bpo_fast.models.load.load_model` where `model` is a path.

    Raises:
        ValueError: `init_kwargs` beside a loaded model.
    """

    model: Any
    processor: Any = None
    adapter: str | os.PathLike | None = None
    init_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.init_kwargs and not self.is_path:
            raise ValueError("model_init_kwargs: found some beside a loaded model, expected them with a path.")

    @property
    def is_path(self) -> bool:
        """Whether the model is named by path, and not loaded yet."""
        return isinstance(self.model, str | Path)

    def check(self) -> None:
        """Refuse files of model and adapter that will not load, before anything waits for them.

        Raises:
            ValueError: see `check_model_files` and `check_adapter_files`.
        """
        model = local_folder("model", self.model) if self.is_path else None
        adapter = None if self.adapter is None else local_folder("adapter", self.adapter)
        if model is not None:
            check_model_files(model)
        if adapter is not None:
            check_adapter_files(adapter)

    def settings(self) -> dict:
        """What of a run's settings the model decides: its weights and its adapter's, data type and quantisation.

        A model id has no commit before it has been downloaded, see `weights_fingerprint`.
        """
        adapter = None
        if self.adapter is not None:
            adapter = {"path": str(self.adapter), "weights": weights_fingerprint(self.adapter, what="adapter")}
        if self.is_path:
            path, weights = str(self.model), weights_fingerprint(self.model)
            dtype, quantization = self.init_kwargs.get("dtype", "auto"), self.init_kwargs.get("quantization")
        else:
            path, weights = self.model.name_or_path, model_fingerprint(self.model)
            dtype, quantization = self.model.dtype, getattr(self.model.config, "quantization_config", None)
        return {
            "model": {"path": path, "weights": weights},
            "adapter": adapter,
            "dtype": str(dtype).removeprefix("torch."),
            "quantization": None if quantization is None else str(quantization),
        }

    def load_processor(self) -> Any:
        """The processor alone."""
        path = str(self.model) if self.is_path else self.model.name_or_path
        return self.processor or load_processor(
            path, trust_remote_code=bool(self.init_kwargs.get("trust_remote_code"))
        )

    def load(self) -> tuple[Any, Any]:
        """The model and its processor."""
        path = str(self.model) if self.is_path else self.model.name_or_path
        processor = self.load_processor()
        model = load_model(path, adapter=self.adapter, **self.init_kwargs) if self.is_path else self.model
        return model, processor
