"""What the API server adds: the JSON endpoints and the dashboard."""
