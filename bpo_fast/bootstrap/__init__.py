"""From annotated images to preference pairs: the model answers from a weakened image, and that answer is rejected."""

from bpo_fast.bootstrap.run import bootstrap
from bpo_fast.models.weaken import weaken

__all__ = ["bootstrap", "weaken"]
