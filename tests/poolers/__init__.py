"""What a service can rely on behind each pooler: `make poolers`."""
