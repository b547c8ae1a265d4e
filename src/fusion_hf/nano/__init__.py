"""`fusion-nano`: the small FUSION that is trained from scratch and shipped with the package."""
