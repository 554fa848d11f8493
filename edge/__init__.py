"""The runtime on the box: capture, detect, crop, encode, match, publish."""
