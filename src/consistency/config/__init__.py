"""The typed study, its rules and keys, and the paths of its files. Nothing is computed; torch is not imported."""
