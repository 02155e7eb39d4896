"""The dashboards as the files that are committed, put into Grafana's image, and into the chart."""

import json
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from grafana import pools, postgresql, service

FOLDER = Path(__file__).parent / "image/dashboards"


def rendered() -> dict[str, str]:
    """Return the text of each file, by its name."""
    made = (service.dashboard(), pools.dashboard(), postgresql.dashboard())
    return {f"{each.uid}.json": json.dumps(each, cls=JSONEncoder, indent=2, ensure_ascii=False) + "\n" for each in made}
