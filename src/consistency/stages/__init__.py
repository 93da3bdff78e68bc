"""One module for each word of the pipeline: it reads files, calls the rooms below, and writes files and a card."""
