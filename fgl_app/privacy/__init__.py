"""Measures of what a run gives away: arithmetic on outputs, features, texts and embeddings."""
