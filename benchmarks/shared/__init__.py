"""What the benchmarks share: measuring, reports, candidates, compiling and predicting."""
