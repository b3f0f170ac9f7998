"""The story of one request, in words of the domain. Knows no HTTP and no torch."""
