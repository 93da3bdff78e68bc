"""The stages of a study, in the order its data goes: each reads files, calls the layers below, writes files."""
