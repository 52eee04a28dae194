"""The OpenAI-compatible server: an engine for many requests at once, and the HTTP API over it."""
