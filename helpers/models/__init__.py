"""Model set-up: from a name to the folders that a page loads. The page's door is ``prepare.prepare_model``."""
