# SPDX-License-Identifier: Apache-2.0
"""Sub-commands of `knapspec` that need more than a few lines; `cli` puts them together."""
