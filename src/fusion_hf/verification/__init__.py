"""Certificates: what a converted folder computes, beside what the authors' own code computes."""
