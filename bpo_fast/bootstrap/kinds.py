"""The table of kinds of negatives. A kind is a module of this folder and its entry here."""

from bpo_fast.bootstrap.maker import Maker

KINDS: dict[str, type[Maker]] = {}
