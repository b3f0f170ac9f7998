"""Every query. Takes a session, never commits, never opens one; the owner is always an argument."""
