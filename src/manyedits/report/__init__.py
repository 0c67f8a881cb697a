"""Reports out of rows: they read run directories and never a model."""
