"""Token ids in, tokens out. Knows torch and Transformers; knows no HTTP, no SQL, no settings."""
