"""Live queries: shared runs, their invalidation, and what each subscriber sees of them."""
