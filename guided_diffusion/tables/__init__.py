"""Plans of many runs, their results, and pages that show them."""
