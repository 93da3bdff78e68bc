"""The mathematics of the method: no file, no network module, no configuration."""
