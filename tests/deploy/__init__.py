"""The chart deploy/helm/lifeguard, rendered and judged without a cluster (`make test-deploy`)."""
