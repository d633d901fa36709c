"""The web page: a model asked from a browser."""
