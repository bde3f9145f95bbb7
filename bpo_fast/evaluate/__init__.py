"""Scorers of model answers: hallucinated objects in descriptions (CHAIR) and yes/no questions (POPE)."""

from bpo_fast.evaluate.chair import score_chair
from bpo_fast.evaluate.pope import score_pope
from bpo_fast.evaluate.run import evaluate

__all__ = ["evaluate", "score_chair", "score_pope"]
