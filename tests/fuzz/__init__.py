"""The parts of `make fuzz`: what sends, what judges, and that a service with faults is caught."""
