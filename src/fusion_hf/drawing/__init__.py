"""Drawn images, and questions about them that have exact answers."""
