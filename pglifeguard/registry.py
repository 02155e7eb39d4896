"""The registry of metrics: what a scrape is given, at once or in slices."""

import asyncio
import math
from collections.abc import Iterable, Iterator
from copy import copy
from functools import lru_cache
from itertools import islice
from typing import NamedTuple, cast

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

# Samples collected and written before other requests get the event loop: about a millisecond's work.
SLICE_SAMPLES = 100
# What OpenMetrics has as its last line.
END = b"# EOF\n"
# Series whose lines are remembered but for their values.
SERIES_KEPT = 20_000
# The text format moves samples of these names to the end of their family.
MOVED = ("_created", "_gsum", "_gcount")


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
                part, is_first = list(islice(samples, SLICE_SAMPLES)), True
                while part or is_first:
                    one = copy(family)
                    one.samples = part
                    yield one
                    part, is_first = list(islice(samples, SLICE_SAMPLES)), False


async def write(slices: Iterable[Metric], *, openmetrics: bool = False) -> bytes:
    """Write the exposition of families in slices; others get the event loop after every `SLICE_SAMPLES` or more.

    Never after twice as many, since no slice has more than `SLICE_SAMPLES`. A turn of the loop for each family would
    cost more than most families do. A thread would not help: it would hold the interpreter's lock for 5 ms at a time.
    With `openmetrics` it is in that format, which has exemplars.
    """
    generate, end = (_openmetrics, END) if openmetrics else (_text, b"")
    parts, name, written = [], "", 0
    for family in slices:
        head, lines = generate(family)
        # HELP and TYPE are in the first slice of a family.
        parts += [lines] if family.name == name else [head, lines]
        name = family.name
        written += len(family.samples)
        if written >= SLICE_SAMPLES:
            await asyncio.sleep(0)
            written = 0
    return b"".join([*parts, end])


class _One(NamedTuple):
    """A registry of one family."""

    family: Metric

    def collect(self) -> list[Metric]:
        """Return the family."""
        return [self.family]


def _openmetrics(family: Metric) -> tuple[bytes, bytes]:
    """Write a family's HELP and TYPE, and its samples."""
    return _split(generate_openmetrics(_One(family)).removesuffix(END))  # type: ignore[no-untyped-call]  # Theirs.


def _text(family: Metric) -> tuple[bytes, bytes]:
    """Write the same in Prometheus' text format, for each series the same line but for its value.

    prometheus-client would escape and sort the labels of each line at each scrape, which is most of its time.
    """
    if any(sample.timestamp is not None or sample.name.endswith(MOVED) for sample in family.samples):
        return _split(generate_latest(_One(family)))
    empty = copy(family)
    empty.samples = []
    lines = [
        f"{_line_of(sample.name, tuple(sample.labels.items()))}{_number(sample.value)}\n" for sample in family.samples
    ]
    return generate_latest(_One(empty)), "".join(lines).encode()


def _number(value: float) -> str:
    return cast("str", floatToGoString(value))  # type: ignore[no-untyped-call]  # Theirs.


@lru_cache(SERIES_KEPT)
def _line_of(name: str, labels: tuple[tuple[str, str], ...]) -> str:
    """Return what prometheus-client writes of a series before its value."""
    family = Metric(name, "", "unknown")
    family.add_sample(name, dict(labels), 0)
    return _split(generate_latest(_One(family)))[1].decode().removesuffix("0.0\n")


def _split(text: bytes) -> tuple[bytes, bytes]:
    help_, type_, lines = text.split(b"\n", 2)
    return b"\n".join((help_, type_, b"")), lines


def _families(collector: Collector) -> Iterator[tuple[Metric, Iterator[Sample]]]:
    """Give a collector's families, each with the known ones of its samples, one by one."""
    if isinstance(collector, MetricWrapperBase):
        # Its `collect` would make the samples of all label values before it returns: 28 ms for 10,000 of them.
        for family in collector.describe():
            samples = collector._samples()  # noqa: SLF001  # Nothing public gives them one by one.
            yield family, _named(family, samples)
    else:
        for family in collector.collect():
            yield family, (sample for sample in family.samples if is_known(family, sample))


def _named(family: Metric, samples: Iterable[Sample]) -> Iterator[Sample]:
    """Give the known ones of a metric's samples, by their whole names."""
    whole, is_gauge = family.name, family.type == "gauge"
    for name, labels, value, timestamp, exemplar, native in samples:
        if not (is_gauge and math.isinf(value)):
            yield Sample(whole + name, labels, value, timestamp, exemplar, native)


def is_known(family: Metric, sample: Sample) -> bool:
    """Whether somebody knows the value of a sample."""
    return family.type != "gauge" or not math.isinf(sample.value)
