"""What runs at a client: captioning its images, writing prompts, and local training."""
