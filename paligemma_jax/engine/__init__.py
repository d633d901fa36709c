"""The engine: requests to tokens over a static key-value cache."""
