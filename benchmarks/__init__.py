"""Benchmarks: `python -m benchmarks.eager` and its siblings. They report; they assert nothing about time."""
