"""Durations as people write them on a command line: `30s`, `10m`, `2h`, `1d`."""

import re

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
# A session that idles for longer is found by less.
MAX_SECONDS = 365 * 86_400


def parse_duration(text: str) -> float:
    """Return the seconds of a duration.

    Raises: ValueError, with a sentence, for anything else, for nothing and for more than a year.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a duration; write a number and its unit, as 30s, 10m, 2h or 1d")
    seconds = float(match[1]) * _UNITS[match[2]]
    if not 0 < seconds <= MAX_SECONDS:
        raise ValueError(f"{text!r} is not between nothing and a year")
    return seconds
