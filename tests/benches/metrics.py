"""What a server under test tells at its metrics address."""

from __future__ import annotations

import re
import urllib.request


def count(metrics_url: str, metric: str, label: str = "") -> float:
    """The sum of a metric over its labels, or of those that hold `label`; 0 where there is none."""
    with urllib.request.urlopen(metrics_url) as page:  # noqa: S310  (of a server on loopback)
        lines = page.read().decode().splitlines()
    found = [re.fullmatch(rf"{metric}\{{(.*)\}} (\S+)", line) for line in lines]
    return sum(float(match[2]) for match in found if match is not None and label in match[1])
