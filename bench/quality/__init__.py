"""What compression costs in quality: tasks, a runner against an OpenAI endpoint, a report."""
