"""Reward functions and their weighting."""

from megalong.rewards.functions import REWARDS, RewardFn, check_problem_types
from megalong.rewards.score import check_weights, score_groups

__all__ = ["REWARDS", "RewardFn", "check_problem_types", "check_weights", "score_groups"]
