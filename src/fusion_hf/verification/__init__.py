"""Certificates that compare a converted folder with the authors' own code."""
