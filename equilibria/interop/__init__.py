"""Other systems: what they saved, and what they computed."""
