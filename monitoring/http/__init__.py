"""HTTP: a server for `/metrics`, `/healthz` and pages, and clients for a Pushgateway and for other runs."""
