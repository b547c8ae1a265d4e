"""Drawn pictures, and questions about them that have exact answers."""
