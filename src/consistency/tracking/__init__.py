"""MLflow: what of a study is shown there, live and afterwards. The results on disk stay the truth."""
