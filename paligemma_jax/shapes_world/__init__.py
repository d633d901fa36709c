"""The shipped model's world, images of coloured shapes: scenes, questions, training stages, evaluation."""
