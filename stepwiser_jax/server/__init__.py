"""A judge over HTTP: a queue before the thread that owns the judge, and the server before it."""
