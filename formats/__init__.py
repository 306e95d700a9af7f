"""Other people's files: data sets, tables and images as they lie on disk."""
