"""The progress bar of a run: responses, their tokens a second, the time left."""

from tqdm.auto import tqdm


class Progress:
    """A bar over all responses of a run; what other processes or earlier runs made counts, but not for the rate.

    Args:
        total: responses of the run, or those that this process is to make.
        shown: False counts without a bar.
    """

    def __init__(self, total: int, *, shown: bool = True):
        self._bar = tqdm(total=total, unit="response", desc="bootstrap", smoothing=0.1, disable=not shown)
        self._tokens = 0

    def made(self, responses: int, tokens: int) -> None:
        """So many more responses, and their tokens, by this process."""
        self._tokens += tokens
        self._bar.update(responses)
        if self._bar.disable:
            return
        seconds = self._bar.format_dict["elapsed"]
        if self._tokens and seconds:
            self._bar.set_postfix_str(f"{self._tokens / seconds:,.0f} tokens/s")

    def known(self, responses: int) -> None:
        """So many more that were there."""
        self._bar.initial += responses
        self._bar.n += responses
        self._bar.refresh()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()
