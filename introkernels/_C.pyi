from typing import Any

def build_info() -> dict[str, Any]:
    """A new dictionary of what was built and how."""
