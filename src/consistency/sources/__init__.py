"""Image sources: folders and archives, and the datasets in them."""
