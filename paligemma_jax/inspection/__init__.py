"""Interpretability: similarity, attention and occlusion maps over patches, the logit lens, embeddings to edit."""
