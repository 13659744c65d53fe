# SPDX-License-Identifier: Apache-2.0
"""Engines for integration tests: real vLLM, in this process, one after the other."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
