"""Errors, files, locks, progress and seeds, for any program. Nothing here knows of images, networks or studies."""
