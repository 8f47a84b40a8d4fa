"""Training: data, losses, schedule samplers and the loop."""
