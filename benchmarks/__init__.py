"""Benchmarks: ``python -m benchmarks.NAME --json FILE``. Contenders take turns, so that ratios are fair."""
