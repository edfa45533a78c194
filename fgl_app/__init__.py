"""Federated Generative Learning as a Flower application."""
