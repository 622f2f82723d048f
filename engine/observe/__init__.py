"""Seeing what an engine does: listeners to `events`."""
