"""Benchmarks: `python -m bench` compares fastrnn with its peers, and each of calls, contention,
memory, table, headline and heatmap is a command of the same kind."""
