"""Models: what they are (spec), where they come from (resolve, weights), and what they compute (layers)."""
