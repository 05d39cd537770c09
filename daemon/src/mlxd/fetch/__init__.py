"""What runs inside a fetcher: the hub's metadata, and the bytes of one model, moved and verified by our own code."""
