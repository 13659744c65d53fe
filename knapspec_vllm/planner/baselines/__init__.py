# SPDX-License-Identifier: Apache-2.0
"""Baselines: the planners of published self-speculative methods, as strategies of our engine.

Each takes the solver's place and nothing else: drafting, verification, prices, acceptance feedback
and the choice among the returned plans stay ours, so that a benchmark compares planners only. Each
is the best of its kind that we can build: what is slow in the published code for no reason of the
method (one candidate at a time, one comparison at a time, batch 1) is batched here. They search on
the host between batches, so unlike `solver.start_solve` a solve waits for the device.
"""

from knapspec_vllm.planner.baselines.clasp import Clasp
from knapspec_vllm.planner.baselines.early_exit import DynamicExit
from knapspec_vllm.planner.baselines.evaluate import evaluate
from knapspec_vllm.planner.baselines.self_sd import SelfSpeculative
from knapspec_vllm.planner.baselines.strategy import NAMES, Strategy, make
from knapspec_vllm.planner.baselines.swift import Swift

__all__ = [
    "NAMES",
    "Clasp",
    "DynamicExit",
    "SelfSpeculative",
    "Strategy",
    "Swift",
    "evaluate",
    "make",
]
