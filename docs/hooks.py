"""What mkdocs does to the pages besides rendering them."""
