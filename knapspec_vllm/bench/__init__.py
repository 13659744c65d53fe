# SPDX-License-Identifier: Apache-2.0
"""Models to try, the demo, and benchmarks. Nothing in the serving path imports this package."""
