"""Small models in the real components' layouts, and how they are built from a data set's own training split."""
