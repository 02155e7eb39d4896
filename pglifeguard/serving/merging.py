"""The metrics files of several workers, added up in slices, so that a scrape does not hold the event loop.

prometheus-client adds them up in one call, which takes 0.2 s for four workers with 10,000 series each. In a thread it
would keep the interpreter's lock from the event loop for 5 ms at a time, and for longer in the middle of a sort.
"""

import asyncio
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client import Metric
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.samples import Sample

from pglifeguard.registry import SLICE_SAMPLES, is_known

Labels = tuple[tuple[str, str], ...]


class File:
    """What was in a worker's file when this was made. The values are parsed when they are asked for."""

    def __init__(self, path: Path) -> None:
        # prometheus-client names them TYPE_PROCESS.db, and gauge_MODE_PROCESS.db. A place has no underscore.
        self.kind, *mode, self.process = path.stem.split("_")
        self.mode = mode[0] if mode else None
        self.values: Iterator[tuple[str, float, float, int]] = MmapedDict.read_all_values_from_file(path)  # type: ignore[no-untyped-call]  # It annotates only parts.


class _Family:
    """The samples of one metric, by their labels."""

    def __init__(self, name: str, text: str, kind: str, mode: str | None) -> None:
        self.name, self.text, self.kind, self.mode = name, text, kind, mode
        # The buckets of a histogram stay with its sum: each count is that of its buckets.
        self.series = defaultdict[Labels, list[Sample]](list)

    def in_slices(self) -> Iterator[Metric]:
        """Give the samples of some series at a time, and keep none that was given."""
        while self.series:
            samples = list[Sample]()
            while self.series and len(samples) < SLICE_SAMPLES:
                samples += self.series.pop(next(iter(self.series)))
            yield self._finished(samples)

    def _finished(self, samples: Sequence[Sample]) -> Metric:
        """Let prometheus-client add up the buckets, and the gauges by their mode."""
        family: Any = Metric(self.name, self.text, self.kind)
        family.samples, family._multiprocess_mode = samples, self.mode  # noqa: SLF001  # Where `merge` leaves it, too.
        # Its public `merge` takes the names of files, and adds up all that is in them.
        finished: Metric
        [finished] = MultiProcessCollector._accumulate_metrics({self.name: family}, accumulate=True)  # type: ignore[no-untyped-call]  # noqa: SLF001
        finished.samples = [sample for sample in finished.samples if is_known(finished, sample)]
        return finished


class _Value(NamedTuple):
    """A value of one worker's gauge, or of all workers' counts."""

    kind: str
    mode: str | None
    process: str | None
    key: str
    value: float
    timestamp: float

    def sort_into(self, families: dict[str, _Family]) -> None:
        """Make a sample of it."""
        name, sample, labels, text = json.loads(self.key)
        if (family := families.get(name)) is None:
            family = families[name] = _Family(name, text, self.kind, self.mode)
        ordered = tuple(sorted(labels.items()))
        series = tuple(label for label in ordered if label[0] != "le")
        if self.process is not None:
            ordered += (("pid", self.process),)
        # The labels are pairs until they are finished.
        family.series[series].append(Sample(sample, ordered, self.value, self.timestamp))  # type: ignore[arg-type]


async def add_up(files: Iterable[File]) -> Iterator[Metric]:
    """Add up the values of all files; return the families in slices, each finished when it is asked for."""
    # A key is a metric, a sample's name and its labels, as JSON. The workers have the same keys, so their values are
    # added up before the keys are parsed.
    counts = defaultdict[str, dict[str, float]](dict)
    # What a gauge of several workers is depends on its mode.
    gauges = list[_Value]()
    for file in files:
        while values := list(islice(file.values, SLICE_SAMPLES)):
            if file.kind == "gauge":
                gauges += (_Value(file.kind, file.mode, file.process, *value[:3]) for value in values)
            else:
                total = counts[file.kind]
                for key, value, _, _ in values:
                    total[key] = total.get(key, 0.0) + value
            await asyncio.sleep(0)
    added = (_Value(kind, None, None, *item, 0.0) for kind, total in counts.items() for item in total.items())
    families = dict[str, _Family]()
    unsorted = chain(added, gauges)
    while some := list(islice(unsorted, SLICE_SAMPLES)):
        for each in some:
            each.sort_into(families)
        await asyncio.sleep(0)
    return (part for family in families.values() for part in family.in_slices())
