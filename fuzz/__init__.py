"""`make fuzz`: what strangers may send, against the service as `make run` serves it; see docs/fuzzing.md."""
