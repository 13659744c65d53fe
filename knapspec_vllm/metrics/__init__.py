# SPDX-License-Identifier: Apache-2.0
"""Counters of what KnapSpec did, kept as plain numbers in the worker."""
