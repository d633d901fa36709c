"""One ml_collections file per way of using the models; paligemma_jax/runs/base.py holds the keys that they share."""
