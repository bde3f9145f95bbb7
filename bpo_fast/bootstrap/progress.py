"""The progress bar of a run: responses, their tokens a second, the time left."""

import sys

from tqdm.auto import tqdm

# Batches whose time stands for all in the forecast.
MEASURED = 5


class Progress:
    """A bar over all responses of a run; what other processes or earlier runs made counts, but not for the rate.

    Args:
        total: responses of the run, or those that this process is to make.
        shown: False counts without a bar.
    """

    def __init__(self, total: int, *, shown: bool = True):
        self._bar = tqdm(total=total, unit="response", desc="bootstrap", smoothing=0.1, disable=not shown)
        self._tokens, self._batches = 0, 0

    def made(self, responses: int, tokens: int) -> None:
        """So many more responses, and their tokens, by this process."""
        self._tokens += tokens
        self._bar.update(responses)
        if self._bar.disable:
            return
        bar, self._batches = self._bar, self._batches + 1
        seconds = bar.format_dict["elapsed"]
        if self._tokens and seconds:
            bar.set_postfix_str(f"{self._tokens / seconds:,.0f} tokens/s")
        if self._batches == MEASURED and bar.n < bar.total:
            left = bar.format_interval((bar.total - bar.n) * seconds / (bar.n - bar.initial))
            bar.write(f"bootstrap: about {left} for the {bar.total - bar.n:,} responses left, alone.", file=sys.stderr)

    def known(self, responses: int) -> None:
        """So many more that were there."""
        if self._bar.disable:
            return
        self._bar.initial += responses
        self._bar.n += responses
        self._bar.refresh()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()
