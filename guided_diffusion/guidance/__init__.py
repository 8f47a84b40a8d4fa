"""Guidance: differences between predictions, added to a denoiser's ε. One technique a file."""
