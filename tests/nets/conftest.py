"""The networks of other libraries, which the benches time too."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benches"))  # importlib mode leaves it off the path
