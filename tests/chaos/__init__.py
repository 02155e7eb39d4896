"""The failure suite: real servers stopped, killed, frozen and promoted, a real network cut, under real load.

`make chaos` runs it whole and prints the table of docs/failures.md with the figures that it measured; `make test`
runs the same tests in a short form (`size`). Some machines are busy: bounds that are a matter of milliseconds are
multiplied by `patience` in the short form, where the figure is not the claim.
"""
