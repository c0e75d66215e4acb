"""The metrics of several replicas as one page."""

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


class MetricFamilies(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def merged(pages: Mapping[str, bytes]) -> bytes:
    """Several pages as one; a label `replica` tells them apart."""
    families: dict[str, Metric] = {}
    for replica, page in pages.items():
        for own in text_string_to_metric_families(page.decode()):
            family = families.setdefault(own.name, Metric(own.name, own.documentation, own.type))
            for sample in own.samples:
                family.add_sample(sample.name, sample.labels | {"replica": replica}, sample.value)
    registry = CollectorRegistry()
    registry.register(MetricFamilies(families.values()))
    return generate_latest(registry)
