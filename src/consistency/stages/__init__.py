"""One module a word of the pipeline: it reads files, calls the rooms below, writes files and a card; and a doctor."""
