"""What runs on a GPU: functions that Triton compiles, and that Python itself never calls."""
