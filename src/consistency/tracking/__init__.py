"""MLflow: a study's runs and models, live and afterwards. The results on disk remain authoritative."""
