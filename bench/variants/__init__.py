"""The ways to serve a patient that are compared: each module has a `create_app()`, and none knows another."""
