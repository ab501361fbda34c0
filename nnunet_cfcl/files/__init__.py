"""Files: atomic writes, JSON, checksums, tables, safe names, hashes."""
