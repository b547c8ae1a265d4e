"""Model folders on disk and on the Hub: finding, checking and publishing them, and registering the auto classes."""
