"""The one place that imports the native extension bpo_fast._C, and that says in a sentence which half is missing."""

from __future__ import annotations

import functools
import importlib

REBUILD_WITH_CUDA = "BPO_FAST_CUDA=on pip install --force-reinstall --no-deps . (in the root of a checkout)"


@functools.cache
def extension():
    """The module bpo_fast._C.

    Raises:
        ImportError: it was not built or cannot be loaded.

    Example:
        >>> extension().cpu_isas()[-1]
        'baseline'
    """
    try:
        return importlib.import_module("bpo_fast._C")
    except ImportError as error:
        raise ImportError(
            f"add_noise needs bpo-fast's native extension bpo_fast._C, which cannot be loaded here ({error}); "
            "with a C++ compiler at hand, run `pip install --force-reinstall --no-deps .` in the root of a checkout."
        ) from error


def cuda_extension():
    """The module bpo_fast._C with its CUDA half.

    Raises:
        ImportError: the extension is missing as a whole.
        RuntimeError: it was built without the CUDA half.
    """
    module = extension()
    if not module.cuda_built:
        raise RuntimeError(
            "add_noise got a CUDA tensor but bpo_fast._C was built without its CUDA half; "
            f"run {REBUILD_WITH_CUDA}, or move the tensor to the CPU, where the same noise has the same bits."
        )
    return module
