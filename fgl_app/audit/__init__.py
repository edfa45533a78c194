"""The audit of finished runs: what models, images and prompts give away. Nothing leaves the machine."""
