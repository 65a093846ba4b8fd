"""Benchmarks: `python -m bench` compares fastrnn with its peers, and each of contention, memory,
table and heatmap is a command of the same kind."""
