"""Synthesis: what to draw (``plan``), how (``generator``), and the process that does it (``worker``, ``launch``)."""
