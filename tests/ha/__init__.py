"""The service on a cluster that fails over by itself: three servers under Patroni, broken in every way that it mends.

`make test-ha` runs all of it and takes half an hour; it makes .venv-ha for Patroni and etcd. `.ci/run` runs two
situations.
"""
