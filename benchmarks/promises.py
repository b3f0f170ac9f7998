"""What a drill counts. Names that begin with ``P`` and a promise's number are to stay 0."""

import re
from collections import Counter

BROKEN = re.compile(r"P\d+ ")


def broken(counts: Counter[str]) -> dict[str, int]:
    """The promises that were broken, and how often."""
    return {name: count for name, count in counts.items() if BROKEN.match(name) and count}


def report(counts: Counter[str], title: str = "") -> int:
    """Print what was counted; the exit status."""
    if title:
        print(title)
    for name, count in counts.items():
        print(f"{count:>8}  {name}")
    print(f"broken promises: {broken(counts) or 'none'}")
    return 1 if broken(counts) else 0
