"""Benchmarks: Forebay compared with a baseline, in one run, so that every result is a ratio."""
