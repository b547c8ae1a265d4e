"""`fusion-nano`, the small FUSION model that is trained from scratch and shipped with the package."""
