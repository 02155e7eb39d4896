"""The failure suite: real servers stopped, killed, frozen and promoted, a real network cut, under real load.

`make chaos` runs it whole and prints the table of docs/failures.md with the figures that it measured; `make test`
runs the same tests in a short form. The short form runs beside other things: it shows what is answered, and leaves how
soon to the full form.
"""

import os

FULL = os.environ.get("CHAOS") == "full"


def in_time(claim: bool, measured: object = "") -> None:  # noqa: FBT001  # As `assert` has it.
    """Assert a claim about seconds, in the full form only."""
    assert claim or not FULL, measured
