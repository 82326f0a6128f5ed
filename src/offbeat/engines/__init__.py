"""Engines: each answers the protocol's requests in its own way."""
