"""How fast, how big and how exact: measured against transformers on the same machine."""
