"""What people see: figures, the report, the dashboard server."""
