"""The only import of the native extension bpo_fast._C, and one sentence about what is missing of it."""

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
            f"bpo_fast._C: found no extension that loads ({error}), expected bpo-fast's native one; with a C++ "
            "compiler, run `pip install --force-reinstall --no-deps .` in the root of a checkout."
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
            f"bpo_fast._C: found no CUDA half, expected one for CUDA tensors; run {REBUILD_WITH_CUDA}, or move the "
            "tensors to the CPU, where the same noise has the same bits."
        )
    return module
