"""Training: data, losses, the loop, fine-tuning."""
