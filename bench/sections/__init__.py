"""What is measured: each module has a `run()` that returns its part of the report."""
