# SPDX-License-Identifier: Apache-2.0
"""Planner: what to skip and how far to draft.

`types` holds the vocabulary, `costs` prices a batch, `acceptance` estimates how often drafts are
accepted, `objective` turns both into tokens per time, `policy` chooses every round, `solver`
finds the plans worth choosing from. Nothing here imports vLLM.
"""
