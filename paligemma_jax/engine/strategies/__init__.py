"""Ways to generate that drive the same state: beams and speculation."""
