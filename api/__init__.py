"""One router a capability: a request validated, a service called, its result shaped."""
