"""One module per question; run as `python -m benchmarks.NAME` from the repository's root."""
