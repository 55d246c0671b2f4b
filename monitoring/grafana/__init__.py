"""Dashboards for Grafana, and what provisions them."""
