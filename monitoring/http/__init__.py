"""HTTP server for `/metrics`, `/healthz` and the run page; clients for a Pushgateway and for other runs' servers."""
