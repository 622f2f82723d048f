"""Documents in SQLite: connections and the lock, tables and indexes, rows, scans. Plain calls, no event loop."""
