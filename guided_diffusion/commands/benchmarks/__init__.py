"""The sections of the benchmark, each of which gives rows."""
