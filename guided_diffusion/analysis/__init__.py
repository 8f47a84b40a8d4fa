"""What attention selects: the attention report."""
