"""A made-up hospital with exact truth: its images, its English, its small models."""
