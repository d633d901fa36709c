"""What a model sees and why it answers: maps over patches, words for them, and embeddings to change."""
