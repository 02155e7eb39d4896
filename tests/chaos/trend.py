"""Whether a figure grows: the judge of a soak."""

from collections.abc import Sequence
from itertools import combinations
from statistics import median

# Seconds since the beginning, and the figure then.
Samples = Sequence[tuple[float, float]]


def rise(samples: Samples) -> float:
    """Return by how much a figure rose from the first sample to the last, as a straight line through all of them tells.

    The line has the median of the slopes of all pairs of samples (Theil and Sen). So up to a quarter of the samples may
    be anything: those of a moment in which a server was away, or the machine was busy with something else.
    """
    slopes = [(later - earlier) / (after - before) for (before, earlier), (after, later) in combinations(samples, 2)]
    return median(slopes) * (samples[-1][0] - samples[0][0])


def ends(samples: Samples) -> tuple[float, float]:
    """Return the medians of the first quarter of the samples and of the last one."""
    figures = [figure for _, figure in samples]
    quarter = max(1, len(figures) // 4)
    return median(figures[:quarter]), median(figures[-quarter:])
