"""Files: written whole or not at all, fetched once, read without trusting them."""
