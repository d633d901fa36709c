"""The shipped model's world, pictures of coloured shapes: scenes, questions, training stages, evaluation."""
