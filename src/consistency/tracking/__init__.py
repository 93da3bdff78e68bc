"""MLflow: a study's runs and models, live and afterwards. The files under results/ remain authoritative."""
