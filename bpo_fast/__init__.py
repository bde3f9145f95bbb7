"""bpo-fast: Bootstrapped Preference Optimization of multimodal language models on one GPU."""

from importlib import import_module

# Names are resolved on first use, so that `import bpo_fast` stays quick and a command such as `bpo-fast doctor`
# works on a machine where one of the heavy dependencies is broken.
_EXPORTS = {
    "BPOConfig": "bpo_fast.train.config",
    "BPOTrainer": "bpo_fast.train.trainer",
    "LossConfig": "bpo_fast.losses.config",
    "NoiseSchedule": "bpo_fast.ops.noise.schedule",
    "PreferenceOutput": "bpo_fast.losses.output",
    "add_noise": "bpo_fast.ops.noise.add",
    "add_noise_ladder": "bpo_fast.ops.noise.ladder",
    "add_noise_rows": "bpo_fast.ops.noise.rows",
    "dpo_loss": "bpo_fast.losses.dpo",
    "linear_dpo_loss": "bpo_fast.losses.dpo",
    "linear_token_logps": "bpo_fast.ops.linear_token_logps",
    "preference_loss": "bpo_fast.losses.preference",
    "token_logps": "bpo_fast.ops.token_logps",
    "vocab_parallel_token_logps": "bpo_fast.ops.vocab_parallel",
}

__all__ = sorted(_EXPORTS)
__version__ = "0.1.0"


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'bpo_fast' has no attribute '{name}'")


def __dir__():
    return [*globals(), *__all__]
