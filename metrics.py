"""Counters for Prometheus. Labels are route templates and fixed words, never a client's text."""

from prometheus_client import Counter, Histogram

REQUESTS = Counter("http_requests_total", "Requests answered", ["route", "method", "status"])
LATENCY = Histogram("http_request_duration_seconds", "Time to the last byte", ["route"])
REFUSED = Counter("prompts_refused_total", "Prompts refused by the content filter")
FINISHED = Counter("generations_finished_total", "Generations that ended", ["status"])
TOKENS = Counter("generated_tokens_total", "Tokens generated and stored")
INTERRUPTED = Counter("generations_interrupted_total", "Records closed for a dead process")
CACHED = Counter("cached_answers_total", "Requests answered with a text that was there already")
TOKENS_SAVED = Counter("cached_tokens_total", "Tokens of such answers, not generated anew")
