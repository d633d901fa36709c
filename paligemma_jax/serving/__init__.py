"""Many requests at once on one model: who is next (`scheduler`), and the thread that answers (`engine`)."""
