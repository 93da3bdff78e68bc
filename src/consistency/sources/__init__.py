"""Where images come from: folders and archives, and the datasets in them."""
