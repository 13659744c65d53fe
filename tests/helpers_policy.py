# SPDX-License-Identifier: Apache-2.0
"""A policy over a model whose costs can be added up in the head."""

from knapspec_vllm.config import KnapSpecConfig
from knapspec_vllm.planner.acceptance import AcceptanceModel
from knapspec_vllm.planner.costs import CostModel
from knapspec_vllm.planner.curves import Curve
from knapspec_vllm.planner.policy import Policy
from knapspec_vllm.planner.types import Batch, Frontier, Plan, PlanEstimate

LAYERS = 10
BATCH = Batch(1, 1000)
HALF = Plan.parse("skip attn:1-5 mlp:1-5", LAYERS)
LIGHT = Plan.parse("skip mlp:1-2", LAYERS)


def flat(value_us, per_row_token_us=0.0):
    return Curve((1,), (value_us,), (per_row_token_us,))


def costs(fixed_us=100.0, verify_us=1200.0, attention_token_us=0.0):
    """A plain step of 1000 us: 10 layers of 40 (attention) + 50 (MLP), 100 fixed."""
    return CostModel(
        num_layers=LAYERS,
        window_tokens=576,
        steps=((1, flat(1000.0)), (2, flat(verify_us)), (9, flat(verify_us))),
        fixed=flat(fixed_us),
        attention=flat(40.0, attention_token_us),
        attention_window=flat(40.0),
        mlp=flat(50.0),
    )


def frontier(*plans_and_hits, trials=1000, context_tokens=1000):
    estimates = tuple(PlanEstimate(plan, 0.9, hits, trials) for plan, hits in plans_and_hits)
    return Frontier(estimates, context_tokens, 1, "solved")


def policy(found=None, model=None, most=8, **settings):
    settings = {"prior_weight": 1e-9, "round_overhead_us": 0.0, **settings}
    config = KnapSpecConfig(**{"min_speedup": 1.03, **settings})
    acceptance = AcceptanceModel(config.prior_weight, config.feedback_half_life)
    made = Policy(config, model or costs(), acceptance, most, LAYERS)
    if found is not None:
        made.set_frontier(found)
    return made, acceptance


def accepted_tokens(generator, chance, drafted):
    """How many of so many drafted tokens are kept, each with this chance if the one before was."""
    count = 0
    while count < drafted and generator.random() < chance:
        count += 1
    return count
