"""SIGTERM and Ctrl-C end a training after the step at hand, with a checkpoint."""

import signal
import sys
import threading
from types import FrameType

import torch
from transformers import TrainerCallback

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal(TrainerCallback):
    """While a training steps, one signal asks for a checkpoint and the end, and a second one ends it at once.

    Before the first step and after the last, signals do what they did. Where several processes train together they
    agree after each step: a signal to one of them stops all.

    Attributes:
        signal: the signal that came, or None.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._previous = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._restore()

    def on_train_begin(self, args, state, control, **kwargs):
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def on_train_end(self, args, state, control, **kwargs):
        self._restore()

    def _restore(self):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None):
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        print(
            f"\n{self.signal.name}: saving a checkpoint after this step; send it again to stop at once.",
            file=sys.stderr,
            flush=True,
        )

    def on_step_end(self, args, state, control, **kwargs):
        stop = self.signal is not None
        if args.world_size > 1:
            flag = torch.tensor([float(stop)], device=args.device)
            torch.distributed.all_reduce(flag)
            stop = bool(flag)
            if stop and self.signal is None:
                self.signal = signal.SIGTERM
        if stop:
            control.should_save = True
            control.should_training_stop = True
        return control
