"""Drawn images, and questions about them with exact answers."""
