"""The registry of metrics: what a scrape is given, at once or in slices."""

import asyncio
import math
from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import dataclass
from itertools import islice

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

# Samples collected and written before other requests get the event loop: about a millisecond's work.
SLICE_SAMPLES = 100
# What OpenMetrics has as its last line.
END = b"# EOF\n"


class Registry(CollectorRegistry):
    """A registry that leaves out the gauges whose value nobody knows."""

    def collect(self) -> Iterator[Metric]:
        """Give the families, without those samples."""
        for family in super().collect():
            family.samples = [sample for sample in family.samples if is_known(family, sample)]
            yield family

    def in_slices(self) -> Iterator[Metric]:
        """Give the families in slices of at most `SLICE_SAMPLES`, each collected when it is asked for.

        The slices of a family follow each other, and a family without samples has one. The series of one set of label
        values are collected at once, so a histogram's count is that of its buckets. Only the metrics of
        prometheus-client itself can be collected by slices; another collector makes all of its samples for the first.
        """
        for collector in list(self._collector_to_names):
            for family, samples in _families(collector):
                known = (sample for sample in samples if is_known(family, sample))
                part, is_first = list(islice(known, SLICE_SAMPLES)), True
                while part or is_first:
                    one = copy(family)
                    one.samples = part
                    yield one
                    part, is_first = list(islice(known, SLICE_SAMPLES)), False


async def write(slices: Iterable[Metric], *, openmetrics: bool = False) -> bytes:
    """Write the exposition of families in slices; others get the event loop after every `SLICE_SAMPLES` or more.

    Never after twice as many, since no slice has more than `SLICE_SAMPLES`. A turn of the loop for each family would
    cost more than most families do. A thread would not help: it would hold the interpreter's lock for 5 ms at a time.
    With `openmetrics` it is in that format, which has exemplars.
    """
    generate, end = (generate_openmetrics, END) if openmetrics else (generate_latest, b"")
    parts, name, written = [], "", 0
    for family in slices:
        text = generate(_One(family)).removesuffix(end)
        # HELP and TYPE are in the first slice of a family.
        parts.append(text if family.name != name else text.split(b"\n", 2)[2])
        name = family.name
        written += len(family.samples)
        if written >= SLICE_SAMPLES:
            await asyncio.sleep(0)
            written = 0
    return b"".join([*parts, end])


@dataclass(frozen=True, slots=True)
class _One:
    """A registry of one family."""

    family: Metric

    def collect(self) -> list[Metric]:
        """Return the family."""
        return [self.family]


def _families(collector: Collector) -> Iterator[tuple[Metric, Iterator[Sample]]]:
    """Give a collector's families, each with its samples one by one."""
    if isinstance(collector, MetricWrapperBase):
        # Its `collect` would make the samples of all label values before it returns: 28 ms for 10,000 of them.
        for family in collector.describe():
            samples = collector._samples()  # noqa: SLF001  # Nothing public gives them one by one.
            yield family, (Sample(family.name + sample.name, *sample[1:]) for sample in samples)
    else:
        for family in collector.collect():
            yield family, iter(family.samples)


def is_known(family: Metric, sample: Sample) -> bool:
    """Whether somebody knows the value of a sample."""
    return family.type != "gauge" or not math.isinf(sample.value)
