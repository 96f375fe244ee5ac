"""Training of the `tiny` model from a procedural world: clips, captions, measures, and every stage up to rCM."""
