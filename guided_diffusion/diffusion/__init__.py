"""The diffusion process, denoisers, samplers and losses. Knows nothing of networks and guidance."""
