"""The table of kinds of negatives. A kind is a module of this folder and its entry here."""

from bpo_fast.bootstrap.error_injected import ErrorInjected
from bpo_fast.bootstrap.image_weakened import ImageWeakened
from bpo_fast.bootstrap.m3po import M3PO
from bpo_fast.bootstrap.maker import Maker
from bpo_fast.bootstrap.self_generated import SelfGenerated
from bpo_fast.bootstrap.sft import ChosenOnly

_ALL = (ImageWeakened, ErrorInjected, SelfGenerated, M3PO, ChosenOnly)
KINDS: dict[str, type[Maker]] = {kind.kind: kind for kind in _ALL}
