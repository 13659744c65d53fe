# SPDX-License-Identifier: Apache-2.0
"""Measures what components cost on the running engine, and keeps the curves on disk."""
