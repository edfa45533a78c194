"""Data: the handwritten digits, folders of images per class, and their partition over clients."""
