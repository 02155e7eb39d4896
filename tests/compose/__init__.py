"""The acceptance suite of the compose topology: `make test-compose`; it needs a Docker engine and starts the stack."""
