"""What a service can rely on behind each pooler: `make poolers` plays it, and writes the table of docs/poolers.md."""

import os

FULL = os.environ.get("POOLERS") == "full"
