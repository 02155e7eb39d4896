"""The failure suite: real servers stopped, killed, frozen and promoted, a real network cut, under real load.

`make chaos` runs it whole and prints the table of docs/failures.md with the figures that it measured; `make test`
runs the same tests in a short form, in which a bound of milliseconds is a bound of tens of them: the short form runs
beside other things, and there the figure is not the claim.
"""

import os

FULL = os.environ.get("CHAOS") == "full"
