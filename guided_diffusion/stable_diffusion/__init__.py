"""Stable Diffusion 1.x, 2.x and SDXL: diffusers' networks and schedulers as denoiser and sampler (optional extra)."""
