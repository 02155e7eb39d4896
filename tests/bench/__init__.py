"""Tests of the benchmark: what could make a figure wrong without anybody noticing."""
