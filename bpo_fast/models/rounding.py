"""How far two ways to compute the same log-probs may be apart where only rounding parts them."""

import torch


def tolerance(eps: float, spread: float) -> float:
    """Most nats that the log-probs of response tokens may differ by in the mean, where only rounding parts them.

    Rounding goes with the precision and with the size of the logits: `eps` is that of the coarsest type that took
    part, `spread` the standard deviation of a token's log-probs over the vocabulary. Measured of exact families, over
    precisions, depths and sizes of weights, the mean is 0.3 to 10 times `eps * spread` in half precision; that of
    wrong ones in float32 is more than 3e-4 of the spread with the smallest weights and 0.05 with usual ones, whence
    4e-5 of it as room for the sums of a deep model. 1e-6 is for the rounding of a log-prob itself. The mean is judged,
    since in bfloat16 single tokens are off by 0.1 nats and more, and a wrong family is off at most tokens.

    Example:
        >>> round(tolerance(torch.finfo(torch.bfloat16).eps, spread=2.5), 2)
        0.23
        >>> round(tolerance(torch.finfo(torch.float32).eps, spread=2.5), 4)
        0.0001
    """
    return spread * (12 * eps + 4e-5) + 1e-6


def eps_of(dtype: torch.dtype, device: torch.device) -> float:
    """The rounding of products in `dtype` on `device`."""
    eps = torch.finfo(dtype).eps
    if device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32":
        eps = max(eps, 2**-10)
    return eps
