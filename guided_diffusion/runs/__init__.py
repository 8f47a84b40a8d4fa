"""A sampling run: ranks, pipelines, shards, progress; and likelihoods."""
