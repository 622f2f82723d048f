"""The app's functions: how they are found, called, bounded and given the database."""
