"""The scripts, one module each: parse, build, run."""
