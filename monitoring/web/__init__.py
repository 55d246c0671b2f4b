"""A run's page: figures and curves in a browser, of static files and one piece of JSON."""
