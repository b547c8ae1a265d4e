"""Model folders, on disk and on the Hub: found, checked, published, and known to transformers' auto classes."""
