"""What results are judged by: pure functions on scores."""
