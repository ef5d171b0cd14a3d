"""Decoding: encoded bytes to uint8 pixels, or why not."""
