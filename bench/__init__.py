"""Benchmarks: Forebay beside a baseline, in one run, so that every result is a ratio."""
